# SPDX-License-Identifier: Apache-2.0
"""Peak memory of this process.

On a GPU: the most memory torch's allocator had handed out. Without one: the most memory the
process had resident, which includes Python and the libraries, so what it had at the start belongs
beside it.
"""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_seqpar import cpu_runtime

CUDA_ALLOCATED = "cuda allocated"
RESIDENT = "resident"


@dataclass(frozen=True)
class MemoryUse:
    """Bytes now and at the peak; `kind` says of what."""

    kind: str
    now: int
    peak: int


def memory_use() -> MemoryUse:
    """This process's memory, of its GPU where it has one."""
    if not cpu_runtime.is_active():  # which answers torch.cuda's questions without a GPU
        import torch

        if torch.cuda.is_available():
            now, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
            return MemoryUse(CUDA_ALLOCATED, now, peak)
    peak = _status("VmHWM") or _largest_resident()
    return MemoryUse(RESIDENT, _status("VmRSS") or peak, peak)


def _status(field: str) -> int | None:
    """A field of Linux's process status, in bytes; None on other systems."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    for line in status.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return None


def _largest_resident() -> int:
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024
