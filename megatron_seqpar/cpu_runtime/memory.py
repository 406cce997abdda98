# SPDX-License-Identifier: Apache-2.0
"""Memory questions are answered with the process's resident memory (RSS), which is true."""

from __future__ import annotations

import collections
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from .presence import physical_memory
from .registry import replace, unit

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def _status(field: str) -> int | None:
    """A field of Linux's process status in bytes; None where the system has no such file."""
    try:
        text = _STATUS.read_text()
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    return None


def peak_rss() -> int:
    """Largest resident memory of this process in bytes, since its start or `reset_peak_rss`."""
    peak = _status("VmHWM")
    if peak is None:
        usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak = usage if sys.platform == "darwin" else usage << 10
    return peak


def current_rss() -> int:
    """Resident memory of this process now, in bytes (its peak where the system only has that)."""
    return _status("VmRSS") or peak_rss()


def reset_peak_rss() -> bool:
    """Start a new peak measurement; False where the system does not allow it."""
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def _memory_stats(device: Any = None) -> collections.defaultdict[str, int]:
    stats: collections.defaultdict[str, int] = collections.defaultdict(int)
    for kind in ("allocated_bytes", "reserved_bytes", "active_bytes"):
        stats[f"{kind}.all.current"] = current_rss()
        stats[f"{kind}.all.peak"] = peak_rss()
    return stats


@unit
def memory_numbers() -> None:
    """Logs of memory show the resident memory of the process: Python and torch included.

    Serves: training/utils/common_utils.py (`report_memory`), training/training.py (memory in the
    log line, `empty_cache`), core/optimizer and checkpointing (`empty_cache`).
    """

    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    def reset(device: Any = None) -> None:
        reset_peak_rss()

    def current(device: Any = None) -> int:
        return current_rss()

    def peak(device: Any = None) -> int:
        return peak_rss()

    def mem_get_info(device: Any = None) -> tuple[int, int]:
        total = physical_memory()
        return max(0, total - current_rss()), total

    for module in (torch.cuda, torch.cuda.memory):
        replace(
            module,
            memory_allocated=current,
            memory_reserved=current,
            memory_cached=current,
            device_memory_used=current,
            max_memory_allocated=peak,
            max_memory_reserved=peak,
            max_memory_cached=peak,
            reset_peak_memory_stats=reset,
            reset_max_memory_allocated=reset,
            reset_accumulated_memory_stats=nothing,
            empty_cache=nothing,
            memory_summary=lambda *args, **kwargs: f"resident memory: {current_rss()} bytes",
            memory_stats=_memory_stats,
            memory_snapshot=lambda *args, **kwargs: [],
            mem_get_info=mem_get_info,
            set_per_process_memory_fraction=nothing,
        )
    replace(
        torch.cuda.memory,
        _record_memory_history=nothing,
        _dump_snapshot=nothing,
        _snapshot=lambda *args, **kwargs: {},
    )
