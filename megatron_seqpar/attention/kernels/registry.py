# SPDX-License-Identifier: Apache-2.0
"""The table of kernel backends, and the choice among them.

An explicit choice that cannot serve the call raises and says what can; "auto" takes the first
record
of the table that is installed and serves the call, and logs which one.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from importlib import import_module

import torch

from ...errors import KernelError
from .base import Kernel, KernelRecord

logger = logging.getLogger(__name__)

_HALF = ("bfloat16", "float16")
_ALL = ("float64", "float32", "bfloat16", "float16")

# in order of preference for "auto"; `reference` last: right everywhere, fast nowhere
KERNELS: tuple[KernelRecord, ...] = (
    KernelRecord(
        "flash3", "flash_attn3", "FlashAttention3", ("cuda",), _HALF, 256, 8, False, True,
        "the hopper build of flash-attn (module flash_attn_interface)",
    ),
    KernelRecord(
        "flash4", "flash_attn4", "FlashAttention4", ("cuda",), _HALF, 128, 8, False, True,
        "pip install --pre flash-attn-4",
    ),
    KernelRecord(
        "flash2", "flash_attn2", "FlashAttention2", ("cuda",), _HALF, 256, 8, False, True,
        "pip install 'flash-attn>=2.7'",
    ),
    KernelRecord(
        "cudnn", "cudnn", "CudnnAttention", ("cuda",), _HALF, 128, 8, False, False,
        "a CUDA build of torch with cuDNN",
    ),
    KernelRecord(
        "aten", "aten_flash", "AtenFlashAttention", ("cuda",), _HALF, 256, 8, False, False,
        "a CUDA build of torch",
    ),
    KernelRecord(
        "cpu", "cpu", "CpuFlashAttention", ("cpu",), _ALL, 1024, 1, False, True, "torch",
    ),
    KernelRecord(
        "reference", "reference", "ReferenceAttention", ("cpu", "cuda"), _ALL, 4096, 1, True, True,
        "torch",
    ),
)  # fmt: skip

_BY_NAME = {record.name: record for record in KERNELS}


def names() -> tuple[str, ...]:
    """Every value that `kernel=` accepts."""
    return ("auto", *_BY_NAME)


def unavailable(record: KernelRecord) -> str | None:
    """Why the backend cannot be loaded on this machine, or None."""
    reason: str | None = import_module(f".{record.module}", __package__).unavailable()
    return None if reason is None else f"{reason} (needs {record.install})"


@lru_cache(maxsize=64)
def _select(
    name: str, device: str, dtype: str, head_dim: int, value_dim: int, deterministic: bool
) -> tuple[str, Kernel]:
    if name != "auto" and name not in _BY_NAME:
        raise KernelError(f"kernel={name!r} is unknown; use one of {', '.join(names())}")
    reasons = []
    for record in KERNELS if name == "auto" else (_BY_NAME[name],):
        reason = record.refuses(device, dtype, head_dim, value_dim, deterministic)
        reason = reason or unavailable(record)
        if reason is None:
            if name == "auto":
                logger.info("attention kernel for %s %s: %s", device, dtype, record.name)
            module = import_module(f".{record.module}", __package__)
            return record.name, getattr(module, record.attribute)()
        reasons.append(f"{record.name}: {reason}")
    if name == "auto":
        raise KernelError("no attention kernel serves this call; " + "; ".join(reasons))
    usable = [
        r.name for r in KERNELS
        if r.refuses(device, dtype, head_dim, value_dim, deterministic) is None
        and unavailable(r) is None
    ]  # fmt: skip
    reason = reasons[0].partition(": ")[2]
    raise KernelError(f"kernel={name!r} {reason}; use one of {', '.join(('auto', *usable))}")


def select(
    name: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int | None = None,
    deterministic: bool = False,
) -> tuple[str, Kernel]:
    """The chosen backend's name and its kernel; `KernelError` says why none can serve the call."""
    plain = str(dtype).removeprefix("torch.")
    return _select(name, device.type, plain, head_dim, value_dim or head_dim, deterministic)


def report() -> list[tuple[str, str]]:
    """(name, "available" or why not) for every backend, for people to read."""
    return [(record.name, unavailable(record) or "available") for record in KERNELS]
