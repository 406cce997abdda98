# SPDX-License-Identifier: Apache-2.0
"""One GPU, asked through NVML (the package `nvidia-ml-py`): memory, power, clock, load, NVLink.

Values are in the units that their names say, whatever NVML counts in: it gives power in mW and
NVLink traffic in KiB since the driver was loaded.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

KIB = 1024
ALL_LINKS = 0xFFFFFFFF
"""NVML's scope of a field for all NVLinks of a GPU together."""

PERMANENT = ("NOT_SUPPORTED", "NO_PERMISSION", "FUNCTION_NOT_FOUND")
"""NVML's errors that asking again does not mend."""

_VALUES = {0: "dVal", 1: "uiVal", 2: "ulVal", 3: "ullVal", 4: "sllVal", 5: "siVal"}
"""NVML's value types: which member of the union holds the value."""


class NvmlAbsent(Exception):
    """NVML cannot be asked; the message says why."""


class Lacking(Exception):
    """A quantity that this GPU, driver or package does not give; asking again is no use."""


class Failed(Exception):
    """A query that failed this time."""


class Gpu:
    """A GPU of this machine.

    Attributes:
        name: NVML's name of it.
        quantities: name -> a function that asks for the value now; it raises `Lacking` or `Failed`,
            and gives None where a value needs an earlier one that is not there yet.
    """

    def __init__(self, uuid: str, nvml: Any = None) -> None:
        """uuid: as torch tells it, with or without "GPU-"; nvml: `pynvml`, imported if not given.

        Raises `NvmlAbsent`.
        """
        if nvml is None:
            try:
                nvml = import_module("pynvml")
            except ImportError:
                raise NvmlAbsent(
                    "nvidia-ml-py is not installed (pip install 'megatron_seqpar[gpu]')"
                ) from None
        self._nvml = nvml
        try:
            nvml.nvmlInit()
        except nvml.NVMLError as error:
            raise NvmlAbsent(f"NVML found no driver: {error}") from None
        full = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
        try:
            self._handle = nvml.nvmlDeviceGetHandleByUUID(full)
            name = nvml.nvmlDeviceGetName(self._handle)
        except nvml.NVMLError as error:
            nvml.nvmlShutdown()
            raise NvmlAbsent(f"NVML knows no GPU {full}: {error}") from None
        self.name: str = name.decode() if isinstance(name, bytes) else name
        self._links: dict[str, tuple[float, int]] = {}
        self.quantities: dict[str, Callable[[], float | None]] = {
            "memory_used_bytes": lambda: self._ask("nvmlDeviceGetMemoryInfo").used,
            "power_watts": lambda: self._ask("nvmlDeviceGetPowerUsage") / 1000,
            "sm_clock_mhz": lambda: self._ask("nvmlDeviceGetClockInfo", "NVML_CLOCK_SM"),
            "utilization_percent": lambda: self._ask("nvmlDeviceGetUtilizationRates").gpu,
            "temperature_celsius": lambda: self._ask(
                "nvmlDeviceGetTemperature", "NVML_TEMPERATURE_GPU"
            ),
            "nvlink_sent_bytes_per_second": lambda: self._rate("TX"),
            "nvlink_received_bytes_per_second": lambda: self._rate("RX"),
        }

    def close(self) -> None:
        """Ask no more."""
        try:
            self._nvml.nvmlShutdown()
        except self._nvml.NVMLError as error:
            raise Failed(str(error)) from None

    def _ask(self, function: str, *constants: str) -> Any:
        """The answer of a function of NVML's for this GPU and some of NVML's constants."""
        nvml = self._nvml
        try:
            values = [getattr(nvml, name) for name in constants]
            return getattr(nvml, function)(self._handle, *values)
        except AttributeError as error:
            raise Lacking(f"this nvidia-ml-py has it not: {error}") from None
        except nvml.NVMLError as error:
            raise self._error(error) from None

    def _rate(self, way: str) -> float | None:
        """Bytes a second over all NVLinks since the last call, "TX" or "RX"; None the first time.

        Payload, without the protocol's own.
        """
        nvml = self._nvml
        field = getattr(nvml, f"NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_{way}", None)
        if field is None or not hasattr(nvml, "nvmlDeviceGetFieldValues"):
            raise Lacking("this nvidia-ml-py has no counters of NVLink")
        try:
            (answer,) = nvml.nvmlDeviceGetFieldValues(self._handle, [(field, ALL_LINKS)])
            now = time.perf_counter()
            if answer.nvmlReturn:
                raise nvml.NVMLError(answer.nvmlReturn)
        except nvml.NVMLError as error:
            raise self._error(error) from None
        member = _VALUES.get(answer.valueType)
        if member is None:
            raise Lacking(f"NVML counts NVLink's traffic in an unknown type, {answer.valueType}")
        sent = int(getattr(answer.value, member)) * KIB
        before = self._links.get(way)
        self._links[way] = now, sent
        # a counter that went back was reset meanwhile
        if before is None or sent < before[1] or now <= before[0]:
            return None
        return (sent - before[1]) / (now - before[0])

    def _error(self, error: Any) -> Exception:
        permanent = {getattr(self._nvml, f"NVML_ERROR_{name}", None) for name in PERMANENT}
        return (Lacking if error.value in permanent else Failed)(str(error))
