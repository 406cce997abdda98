# SPDX-License-Identifier: Apache-2.0
"""The table of kernel backends, and the choice among them.

An explicit choice that cannot serve the call raises and says what can; "auto" takes the first
record of the table that is installed and serves the call, and logs which one.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from importlib import import_module

import torch

from ...errors import KernelError
from .bands import CutBands
from .base import Bands, Kernel, KernelRecord, Wanted
from .padding import PaddedHeads

logger = logging.getLogger(__name__)

_HALF = ("bfloat16", "float16")
_ALL = ("float64", "float32", "bfloat16", "float16")
_MLA = ((192, 128),)  # keys 128 + 64 wide, values 128 wide
_FROM_AMPERE = (8, 9, 10, 11, 12)

# in order of preference for "auto"; `reference` last: right everywhere, fast nowhere
KERNELS: tuple[KernelRecord, ...] = (
    KernelRecord(
        "flash3", "flash_attn3", "FlashAttention3", ("cuda",), _HALF, 256, 8, _MLA, 192,
        Bands.ALL, True, (9,), "flash_attn_3, the hopper build of flash-attn",
    ),
    KernelRecord(
        "flash4", "flash_attn4", "FlashAttention4", ("cuda",), _HALF, 128, 8, _MLA, 192,
        Bands.ALL, True, (9, 10, 11), "pip install --pre flash-attn-4",
    ),
    KernelRecord(
        "flash2", "flash_attn2", "FlashAttention2", ("cuda",), _HALF, 256, 8, (), 256,
        Bands.NOT_TALL, True, _FROM_AMPERE, "pip install 'flash-attn>=2.7,<2.9'",
    ),
    KernelRecord(
        "cudnn", "cudnn", "CudnnAttention", ("cuda",), _HALF, 128, 8, (), 0,
        Bands.NONE, False, _FROM_AMPERE, "a CUDA build of torch with cuDNN 9",
    ),
    KernelRecord(
        "aten", "aten_flash", "AtenFlashAttention", ("cuda",), _HALF, 256, 8, (), 256,
        Bands.NOT_TALL, False, _FROM_AMPERE, "a CUDA build of torch",
    ),
    KernelRecord(
        "cpu", "cpu", "CpuFlashAttention", ("cpu",), _ALL, 1024, 1, (), 1024,
        Bands.NONE, False, (), "torch",
    ),
    KernelRecord(
        "reference", "reference", "ReferenceAttention", ("cpu", "cuda"), _ALL, 4096, 1, None, 4096,
        Bands.ALL, True, (), "torch",
    ),
)  # fmt: skip

_BY_NAME = {record.name: record for record in KERNELS}


def names() -> tuple[str, ...]:
    """Every value that `kernel=` accepts."""
    return ("auto", *_BY_NAME)


def unavailable(record: KernelRecord) -> str | None:
    """Why the backend cannot be loaded on this machine, or None."""
    reason: str | None = import_module(f".{record.module}", __package__).unavailable()
    if reason is not None:
        return f"{reason} (needs {record.install})"
    if record.archs and torch.cuda.get_device_capability()[0] not in record.archs:
        major, minor = torch.cuda.get_device_capability()
        served = ", ".join(f"{arch}.x" for arch in record.archs)
        return f"serves GPUs of compute capability {served}, not {major}.{minor}"
    return None


@lru_cache(maxsize=64)
def _select(name: str, wanted: Wanted) -> tuple[str, Kernel]:
    if name != "auto" and name not in _BY_NAME:
        raise KernelError(f"kernel={name!r} is unknown; use one of {', '.join(names())}")
    reasons: list[str] = []
    for record in KERNELS if name == "auto" else (_BY_NAME[name],):
        reason = record.refuses(wanted) or unavailable(record)
        if reason is None:
            if name == "auto":
                _say(record, wanted, reasons)
            return record.name, _load(record, wanted.head_dim, wanted.value_dim)
        reasons.append(f"{record.name} {reason}")
    if name == "auto":
        raise KernelError("no attention kernel serves this call; " + "; ".join(reasons))
    usable = [r.name for r in KERNELS if r.refuses(wanted) is None and unavailable(r) is None]
    reason = reasons[0].removeprefix(f"{name} ")
    raise KernelError(f"kernel={name!r}: {reason}; use one of {', '.join(('auto', *usable))}")


def _load(record: KernelRecord, head_dim: int, value_dim: int) -> Kernel:
    kernel: Kernel = getattr(import_module(f".{record.module}", __package__), record.attribute)()
    if record.bands is not Bands.ALL:
        kernel = CutBands(kernel, record.bands)
    padded = record.padded_dim(head_dim, value_dim)
    return kernel if padded is None else PaddedHeads(kernel, padded)


def _say(record: KernelRecord, wanted: Wanted, passed_over: list[str]) -> None:
    """Log what "auto" took, and why not what stands before it in the table."""
    # the reference is right but slow: nobody wants it on a GPU without knowing
    level = logging.WARNING if record.name == "reference" else logging.INFO
    others = [reason for reason in passed_over if f"tensors, not {wanted.device}" not in reason]
    because = f" ({'; '.join(others)})" if others else ""
    text = "attention kernel for %s %s: %s%s"
    logger.log(level, text, wanted.device, wanted.dtype, record.name, because)


def select(
    name: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int | None = None,
    deterministic: bool = False,
    softcap: bool = False,
) -> tuple[str, Kernel]:
    """The chosen backend's name and its kernel, which serves every band of diagonals.

    Args:
        name: one of `names()`.
        value_dim: of values and outputs, if other than `head_dim`.
        deterministic: gradients must repeat bitwise.
        softcap: calls will cap their scores.

    `KernelError` says why none can serve such calls, or what can in place of the named one.
    """
    plain = str(dtype).removeprefix("torch.")
    wanted = Wanted(device.type, plain, head_dim, value_dim or head_dim, deterministic, softcap)
    return _select(name, wanted)


def report() -> list[tuple[str, str]]:
    """(name, "available" or why not) for every backend, for people to read."""
    return [(record.name, unavailable(record) or "available") for record in KERNELS]
