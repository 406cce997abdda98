# SPDX-License-Identifier: Apache-2.0
"""Switch the CPU runtime on in this process, once, and in the processes it starts."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Iterable
from types import ModuleType

from megatron_seqpar import compatibility
from megatron_seqpar.errors import SeqParError

from . import child
from .import_hooks import after_import
from .registry import UNITS, Unit

CHECKED_VERSIONS = {
    "torch": ("2.11",),
    "megatron-core": compatibility.FAMILIES,
}
"""Version prefixes that the units were run with; others get a warning."""

UNIT_MODULES = (
    "devices",
    "presence",
    "streams",
    "memory",
    "rng",
    "collectives",
    "optimizer",
    "megatron_hooks",
    "hybrid_hooks",
)
ENVIRONMENT = {
    # torch.compile would need a C++ compiler and minutes to give a CPU kernel of the same result
    "TORCHDYNAMO_DISABLE": "1",
    # demanded by stock TP and CP below Blackwell
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
}

_active = False


def is_active() -> bool:
    """Whether `activate` has run in this process."""
    return _active


def default_threads() -> int:
    """Threads per process such that the processes of this machine share its cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def share_cores() -> None:
    """Set OMP_NUM_THREADS, unless it is set, before torch is imported and reads it."""
    os.environ.setdefault("OMP_NUM_THREADS", str(default_threads()))


def activate(*, leave_out: Iterable[str] = ()) -> None:
    """Make CUDA mean CPU and NCCL mean gloo in this process and the processes it starts.

    Call it before the first import of Megatron. A second call does nothing. `leave_out` names units
    that are not applied (for tests; units are listed by `units()`).

    Raises SeqParError where torch sees a GPU, and where Megatron was imported before.
    """
    global _active
    if _active:
        return
    share_cores()
    import torch

    if torch.cuda.is_available():
        raise SeqParError(
            "the CPU runtime is for machines without a GPU, but torch sees "
            f"{torch.cuda.device_count()}; use --device cuda, or hide them by setting "
            "CUDA_VISIBLE_DEVICES= (empty) in the environment"
        )
    if "megatron.core" in sys.modules:
        raise SeqParError(
            "megatron.core was imported before the CPU runtime was activated; call "
            "megatron_seqpar.cpu_runtime.activate() first, or start the script with "
            "`python -m megatron_seqpar run --device cpu SCRIPT`"
        )
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    skipped = set(leave_out)
    for name, each in units().items():
        if name not in skipped:
            each.apply()
    _warn_unless_checked("torch", torch.__version__)
    after_import("megatron.core.package_info", _check_megatron)
    if "child_processes" not in skipped:
        child.arm()
    _active = True


def units() -> dict[str, Unit]:
    """Every unit by name, in the order they are applied. Imports torch."""
    for module in UNIT_MODULES:
        importlib.import_module(f"{__package__}.{module}")
    return dict(UNITS)


def _check_megatron(module: ModuleType) -> None:
    _warn_unless_checked("megatron-core", module.__version__)


def _warn_unless_checked(package: str, version: str) -> None:
    if os.environ.get("RANK", "0") != "0" or child.is_child():
        return
    checked = CHECKED_VERSIONS[package]
    if not any(version == known or version.startswith(known + ".") for known in checked):
        warnings.warn(
            f"the CPU runtime was checked with {package} {', '.join(checked)}; this is {version}",
            stacklevel=3,
        )
