# SPDX-License-Identifier: Apache-2.0
"""What a result file says of where it was measured."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def describe() -> dict[str, Any]:
    """Command, versions and hardware of this process."""
    words = ["megatron-seqpar", *sys.argv[1:]]
    return {
        "command": shlex.join(words),
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("torch", "megatron-core", "megatron_seqpar")},
        },
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text(encoding="utf-8").splitlines() if listing.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
