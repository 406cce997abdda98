# SPDX-License-Identifier: Apache-2.0
"""How long the device takes: CUDA events, warm-up, an emptied L2 cache, medians.

Before each measured call a buffer of four times the L2 cache is written, so nothing that the call
reads is still there from the call before; and while it is written the host gets ahead, so the gaps
between launches are not measured. Clocks are left as they are and read out (`clocks`).
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

_AHEAD_CYCLES = 4_000_000  # about 2 ms for the host to get ahead
_SMI_FIELDS = (
    "clocks.sm", "clocks.mem", "clocks.max.sm", "temperature.gpu", "power.draw", "power.limit",
    "clocks_event_reasons.active",
)  # fmt: skip


class Timing(NamedTuple):
    """Milliseconds of one call."""

    median: float
    least: float
    most: float
    calls: int


def time_calls(
    call: Callable[[], Any],
    device: torch.device,
    *,
    seconds: float,
    warm_up: int = 2,
    least: int = 3,
    most: int = 50,
) -> Timing:
    """Times of `call`, repeated for about `seconds`, at least `least` and at most `most` times."""
    measure = _on_gpu if device.type == "cuda" else _on_cpu
    for _ in range(warm_up):
        call()
    once = measure(call, device, 1)[0]
    calls = max(least, min(most, int(seconds * 1e3 / max(once, 1e-3))))
    times = measure(call, device, calls)
    return Timing(statistics.median(times), min(times), max(times), calls)


def _on_gpu(call: Callable[[], Any], device: torch.device, calls: int) -> list[float]:
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    flush = torch.empty(4 * cache, dtype=torch.uint8, device=device)
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    torch.cuda._sleep(_AHEAD_CYCLES)
    for start, end in marks:
        flush.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) for start, end in marks]


def _on_cpu(call: Callable[[], Any], device: torch.device, calls: int) -> list[float]:
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def clocks() -> dict[str, str] | None:
    """Clocks, temperature and power of the first GPU now; None without nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = [
        "nvidia-smi",
        f"--query-gpu={','.join(_SMI_FIELDS)}",
        "--format=csv,noheader",
        "-i",
        "0",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    if done.returncode != 0:
        return {"error": (done.stderr or done.stdout).strip()[:200]}
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return dict(zip(_SMI_FIELDS, values, strict=False))
