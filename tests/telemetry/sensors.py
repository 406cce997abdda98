# SPDX-License-Identifier: Apache-2.0
"""A stand-in for `pynvml` with the sensors of a GPU; names and structures of 13.615.71."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

from tests.simulate.nvml import Handle, Nvml, NVMLError


class _Value(ctypes.Union):
    _fields_ = (
        ("dVal", ctypes.c_double),
        ("uiVal", ctypes.c_uint),
        ("ulVal", ctypes.c_ulong),
        ("ullVal", ctypes.c_ulonglong),
    )


class FieldValue(ctypes.Structure):
    """`c_nvmlFieldValue_t`."""

    _fields_ = (
        ("fieldId", ctypes.c_uint32),
        ("scopeId", ctypes.c_uint32),
        ("timestamp", ctypes.c_int64),
        ("latencyUsec", ctypes.c_int64),
        ("valueType", ctypes.c_uint),
        ("nvmlReturn", ctypes.c_uint),
        ("value", _Value),
    )


class Sensors(Nvml):
    """One H100.

    Attributes:
        kib: what NVLink has carried, by field; what a test sets is what is read.
        link_error: the code that single NVLink fields return.
        times: how often each function was called.
    """

    NVML_ERROR_NOT_SUPPORTED = 3
    NVML_ERROR_NO_PERMISSION = 4
    NVML_ERROR_FUNCTION_NOT_FOUND = 13
    NVML_CLOCK_SM = 1
    NVML_TEMPERATURE_GPU = 0
    NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX = 138
    NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX = 139

    def __init__(self, fails: dict[str, int] | None = None, link_error: int = 0) -> None:
        super().__init__(["NVIDIA H100 80GB HBM3"], fails=fails)
        self.kib = {138: 0, 139: 0}
        self.link_error = link_error
        self.times: dict[str, int] = {}

    def _called(self, name: str) -> None:
        self.times[name] = self.times.get(name, 0) + 1
        super()._called(name)

    def nvmlDeviceGetMemoryInfo(self, handle: Handle) -> Any:
        self._called("nvmlDeviceGetMemoryInfo")
        return SimpleNamespace(total=80 << 30, free=16 << 30, used=64 << 30)

    def nvmlDeviceGetPowerUsage(self, handle: Handle) -> int:
        """Milliwatts."""
        self._called("nvmlDeviceGetPowerUsage")
        return 412_500

    def nvmlDeviceGetClockInfo(self, handle: Handle, kind: int) -> int:
        """MHz."""
        self._called("nvmlDeviceGetClockInfo")
        assert kind == self.NVML_CLOCK_SM
        return 1755

    def nvmlDeviceGetUtilizationRates(self, handle: Handle) -> Any:
        self._called("nvmlDeviceGetUtilizationRates")
        return SimpleNamespace(gpu=87, memory=40)

    def nvmlDeviceGetTemperature(self, handle: Handle, sensor: int) -> int:
        self._called("nvmlDeviceGetTemperature")
        assert sensor == self.NVML_TEMPERATURE_GPU
        return 61

    def nvmlDeviceGetFieldValues(self, handle: Handle, asked: list[tuple[int, int]]) -> Any:
        """KiB since the driver was loaded, over all links of the GPU."""
        self._called("nvmlDeviceGetFieldValues")
        answers = (FieldValue * len(asked))()
        for answer, (field, scope) in zip(answers, asked, strict=True):
            assert scope == 0xFFFFFFFF
            answer.fieldId, answer.scopeId = field, scope
            answer.nvmlReturn, answer.valueType = self.link_error, 3
            answer.value.ullVal = self.kib[field]
        return answers


__all__ = ["FieldValue", "NVMLError", "Sensors"]
