# SPDX-License-Identifier: Apache-2.0
"""What a result file says of where it was measured, and how it is written."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..errors import SeqParError
from ..experiments import host
from ..experiments.store import write_whole

OPTIONAL = ("transformer-engine", "flash-attn", "flash_attn_3", "flash-attn-4", "triton")
VARIABLES = ("CUDA_", "NCCL_", "TORCH_NCCL_", "PYTORCH_", "GLOO_", "SEQPAR_", "OMP_NUM_THREADS")
_QUERY = ("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")


def describe() -> dict[str, Any]:
    """Command, versions and hardware of this process, its GPUs among them.

    GPUs are asked for through nvidia-smi, so that this process takes no memory of theirs.
    """
    gpus = _gpus()
    found = host.describe()
    found["versions"] |= {name: known for name in OPTIONAL if (known := _version(name))}
    found["versions"] |= _cuda_versions() if gpus else {}
    return {
        **found,
        "command": command(sys.argv),
        **({"gpus": gpus} if gpus else {}),
        "variables": {
            name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)
        },
    }


def gpu_memory_bytes(described: dict[str, Any]) -> int | None:
    """Memory of the smallest GPU of a description, None without one."""
    texts = [gpu["memory"] for gpu in described.get("gpus", ())]
    return min((int(text.split()[0]) * 2**20 for text in texts), default=None)


def command(argv: Sequence[str]) -> str:
    """The command line as a user would type it, without folders of this machine."""
    name = Path(argv[0]).name
    if name in ("megatron-seqpar", "__main__.py"):
        return shlex.join(["megatron-seqpar", *argv[1:]])
    return shlex.join(["python", *argv])


def write(result: dict[str, Any], path: Path) -> None:
    """Write a result as JSON, whole or not at all. SeqParError where it cannot be written."""
    try:
        write_whole(path, json.dumps(result, indent=1) + "\n")
    except OSError as error:
        raise SeqParError(f"{path}: cannot be written: {error.strerror or error}") from None


def _gpus() -> list[dict[str, str]]:
    """Name, memory ("81559 MiB") and driver of each GPU; nothing without nvidia-smi."""
    if shutil.which(_QUERY[0]) is None:
        return []
    done = subprocess.run(_QUERY, capture_output=True, text=True, timeout=60, check=False)
    lines = done.stdout.strip().splitlines() if done.returncode == 0 else []
    return [
        dict(zip(("name", "memory", "driver"), map(str.strip, line.split(",")), strict=False))
        for line in lines
    ]


def _cuda_versions() -> dict[str, str]:
    import torch

    if torch.version.cuda is None:
        return {}
    nccl: Any = torch.cuda.nccl.version()
    return {"cuda": torch.version.cuda, "nccl": ".".join(map(str, nccl))}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
