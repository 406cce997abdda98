# SPDX-License-Identifier: Apache-2.0
"""Do shared memory and the limits of a process leave room?"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from ..finding import Asked, Finding, Status
from ..machine import Machine

SHARED_MEMORY = Path("/dev/shm")
MIB = 2**20
LITTLE_SHARED = 1024 * MIB
TOO_LITTLE_SHARED = {"gloo": 16 * MIB, "nccl": 64 * MIB}
"""NCCL's buffers between the GPUs of a machine; data loaders alone may do with less."""

FILES_OF_A_RANK = 1024
"""Open files and sockets of a rank: loaders, libraries, and a socket a peer and group."""

SOCKETS_OF_A_PEER = 16


def check(asked: Asked, machine: Machine) -> Finding:
    """Free shared memory (NCCL, data loaders), open files, and memory that InfiniBand may lock."""
    facts: dict[str, int] = {}
    wrong: list[tuple[Status, str, str]] = []
    if SHARED_MEMORY.is_dir():
        free = facts["shared_memory_free_bytes"] = shutil.disk_usage(SHARED_MEMORY).free
        if free < LITTLE_SHARED:
            least = TOO_LITTLE_SHARED[machine.backend(asked.device, asked.nproc)]
            status = Status.PROBLEM if free < least else Status.WARNING
            text = f"{free // MIB} MiB of shared memory are free in {SHARED_MEMORY}"
            fix = f"mount -o remount,size=8g {SHARED_MEMORY} (in Docker: docker run --shm-size=8g)"
            wrong.append((status, text, fix))
    if sys.platform != "win32":
        import resource

        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        facts["open_files"] = files
        needed = FILES_OF_A_RANK + SOCKETS_OF_A_PEER * (asked.world or asked.nproc)
        if files != resource.RLIM_INFINITY and files < needed:
            text = f"a process may open {files} files, and a run wants some {needed}"
            wrong.append((Status.WARNING, text, f"ulimit -n {max(65536, needed)}"))
        locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        facts["locked_memory_bytes"] = locked
        if _has_infiniband() and locked != resource.RLIM_INFINITY:
            text = f"only {locked // MIB} MiB may be locked, and InfiniBand wants no limit"
            fix = "ulimit -l unlimited (in Docker: docker run --ulimit memlock=-1)"
            wrong.append((Status.WARNING, text, fix))
    if wrong:
        worst = max((status for status, _, _ in wrong), key=lambda s: s is Status.PROBLEM)
        text, fix = ("; ".join(parts) for parts in zip(*(one[1:] for one in wrong), strict=True))
        return Finding("limits", worst, text, fix, data=facts)
    shown = []
    if "shared_memory_free_bytes" in facts:
        shown.append(f"{facts['shared_memory_free_bytes'] / 2**30:,.1f} GiB shared memory free")
    if "open_files" in facts:
        shown.append(f"{facts['open_files']:,} open files")
    return Finding("limits", Status.OK, ", ".join(shown) or "none on this system", data=facts)


def _has_infiniband() -> bool:
    folder = Path("/sys/class/infiniband")
    return folder.is_dir() and any(folder.iterdir())
