# SPDX-License-Identifier: Apache-2.0
"""A stand-in for the module `pynvml` of nvidia-ml-py 13.615.71: its names, a machine made up."""

from __future__ import annotations

from typing import NamedTuple


class NVMLError(Exception):
    """As pynvml's: raised with an error code."""

    def __init__(self, value: int) -> None:
        super().__init__(value)
        self.value = value

    def __str__(self) -> str:
        return {1: "Uninitialized", 2: "Invalid Argument", 3: "Not Supported", 6: "Not Found",
                9: "Driver Not Loaded"}[self.value]  # fmt: skip


class Handle(NamedTuple):
    """What stands for a device."""

    index: int


class Nvml:
    """The module.

    Args:
        models: of the GPUs, by index.
        nvlinks: pairs of GPUs that NVLink joins.
        switches: whether the NVLinks end in a switch.
        fails: functions that raise, with the code.
    """

    NVMLError = NVMLError
    NVML_P2P_CAPS_INDEX_NVLINK = 2
    NVML_P2P_STATUS_OK = 0
    NVML_P2P_STATUS_NOT_SUPPORTED = 5
    NVML_NVLINK_MAX_LINKS = 36
    NVML_FEATURE_ENABLED = 1
    NVML_FEATURE_DISABLED = 0
    NVML_NVLINK_DEVICE_TYPE_GPU = 0
    NVML_NVLINK_DEVICE_TYPE_SWITCH = 2

    def __init__(
        self,
        models: list[str],
        nvlinks: set[tuple[int, int]] = frozenset(),  # type: ignore[assignment]
        switches: bool = False,
        fails: dict[str, int] | None = None,
    ) -> None:
        self.models, self.switches = models, switches
        self.nvlinks = nvlinks | {(b, a) for a, b in nvlinks}
        self.fails = fails or {}
        self.open = 0

    def _called(self, name: str) -> None:
        if name in self.fails:
            raise NVMLError(self.fails[name])
        if name != "nvmlInit" and not self.open:
            raise NVMLError(1)

    def nvmlInit(self) -> None:
        self._called("nvmlInit")
        self.open += 1

    def nvmlShutdown(self) -> None:
        self._called("nvmlShutdown")
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:
        self._called("nvmlDeviceGetCount")
        return len(self.models)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Handle:
        self._called("nvmlDeviceGetHandleByIndex")
        if not 0 <= index < len(self.models):
            raise NVMLError(2)
        return Handle(index)

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Handle:
        self._called("nvmlDeviceGetHandleByUUID")
        for index in range(len(self.models)):
            if uuid == f"GPU-{index}":
                return Handle(index)
        raise NVMLError(6)

    def nvmlDeviceGetName(self, handle: Handle) -> str:
        self._called("nvmlDeviceGetName")
        return self.models[handle.index]

    def nvmlDeviceGetP2PStatus(self, device1: Handle, device2: Handle, p2pIndex: int) -> int:
        self._called("nvmlDeviceGetP2PStatus")
        assert p2pIndex == self.NVML_P2P_CAPS_INDEX_NVLINK
        joined = (device1.index, device2.index) in self.nvlinks
        return self.NVML_P2P_STATUS_OK if joined else self.NVML_P2P_STATUS_NOT_SUPPORTED

    def nvmlDeviceGetNvLinkState(self, device: Handle, link: int) -> int:
        self._called("nvmlDeviceGetNvLinkState")
        if link >= 12:  # as on an A100
            raise NVMLError(2)
        return self.NVML_FEATURE_DISABLED if link == 0 else self.NVML_FEATURE_ENABLED

    def nvmlDeviceGetNvLinkRemoteDeviceType(self, handle: Handle, link: int) -> int:
        self._called("nvmlDeviceGetNvLinkRemoteDeviceType")
        if link == 0:
            raise NVMLError(3)
        kinds = self.NVML_NVLINK_DEVICE_TYPE_GPU, self.NVML_NVLINK_DEVICE_TYPE_SWITCH
        return kinds[self.switches]
