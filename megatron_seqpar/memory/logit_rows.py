# SPDX-License-Identifier: Apache-2.0
"""What cross entropy wants of some rows of logits, and the kernels that compute it.

Two operations, on the logits `[n, v]` of n tokens over one rank's part of the vocabulary:

    statistics  largest logit, sum of exponentials and the label's logit of every row
    gradient    the logits' gradient from the rows' log-sum-exps, written over the logits

Arithmetic is fp32 whatever the logits' dtype (fp64 for fp64), as in Megatron's own loss. The torch
kernel widens bf16 logits first and so holds them a second time, at twice the size; the Triton
kernel widens in registers and holds nothing. Both overwrite the logits.

Why not a library: Liger-Kernel and cut-cross-entropy have losses fused with the head, for a
vocabulary over ranks too, but they multiply with the head's weight themselves. Here Megatron's own
layer must do that, for its transfers, its accumulation into `main_grad` and its variants for frozen
and tied weights. A loss on logits alone, which Liger has too, keeps something of the logits' size
from forward to backward, and that is what pieces exist to avoid.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module, util
from typing import Protocol

import torch

from megatron_seqpar.errors import KernelError

logger = logging.getLogger(__name__)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that logits of `dtype` are reckoned in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Statistics:
    """Of n rows of one rank's part of the vocabulary; `[n]` each, fp32 or fp64.

    maximum: the largest logit.
    total: sum of exp(logit - maximum); of exp(logit) where every logit is minus infinity.
    target: the label's logit, 0 for a label outside of this part.
    winner: position of the first largest logit, int64, or None if not asked for.
    """

    maximum: torch.Tensor
    total: torch.Tensor
    target: torch.Tensor
    winner: torch.Tensor | None


class RowKernel(Protocol):
    """How a kernel is called. `labels`: `[n]` int64, counted from this part's first logit; a row
    whose label is outside of [0, v) has no label here."""

    def statistics(self, logits: torch.Tensor, labels: torch.Tensor, winner: bool) -> Statistics:
        """Overwrites `logits`, contiguous `[n, v]`."""

    def gradient(
        self, logits: torch.Tensor, labels: torch.Tensor, lse: torch.Tensor, grad: torch.Tensor
    ) -> torch.Tensor:
        """`(exp(logits - lse) - onehot) * grad` in the logits' dtype, written over them.

        lse: `[n]`, over the whole vocabulary. grad: `[n]`, gradient of each row's loss.
        """


def own(labels: torch.Tensor, size: int) -> torch.Tensor:
    """Which rows have their label among `size` logits; bool `[n]`."""
    return (labels >= 0) & (labels < size)


class TorchRows:
    """Any device and dtype, in a handful of passes."""

    def statistics(self, logits: torch.Tensor, labels: torch.Tensor, winner: bool) -> Statistics:
        x = logits.to(wide(logits.dtype))
        maximum, position = x.max(-1)
        here = own(labels, x.shape[1])
        target = x.gather(1, torch.where(here, labels, 0)[:, None])[:, 0]
        target = torch.where(here, target, 0.0)
        # A part of the vocabulary may be masked out whole: exp(-inf - -inf) is not a number.
        shift = torch.where(maximum == -torch.inf, 0.0, maximum)
        total = x.sub_(shift[:, None]).exp_().sum(-1)
        return Statistics(maximum, total, target, position if winner else None)

    def gradient(
        self, logits: torch.Tensor, labels: torch.Tensor, lse: torch.Tensor, grad: torch.Tensor
    ) -> torch.Tensor:
        x = logits.to(wide(logits.dtype)).sub_(lse[:, None]).exp_()
        here = own(labels, x.shape[1])
        x.scatter_add_(1, torch.where(here, labels, 0)[:, None], -here.to(x.dtype)[:, None])
        x.mul_(grad[:, None])
        return x if x.data_ptr() == logits.data_ptr() else logits.copy_(x)


def _always() -> str | None:
    return None


def _no_triton() -> str | None:
    return None if util.find_spec("triton") is not None else "triton is not installed"


@dataclass(frozen=True)
class RowKernelRecord:
    """One line of the table: a kernel, where it runs and on what.

    module, attribute: where its class is, imported when it is chosen.
    unavailable: why it cannot be loaded here, or None.
    """

    name: str
    module: str
    attribute: str
    devices: tuple[str, ...] | None
    dtypes: tuple[torch.dtype, ...] | None
    unavailable: Callable[[], str | None]

    def refuses(self, device: str, dtype: torch.dtype) -> str | None:
        """Why it does not serve such logits, or None."""
        if self.devices is not None and device not in self.devices:
            return f"serves {', '.join(self.devices)} tensors, not {device}"
        if self.dtypes is not None and dtype not in self.dtypes:
            served = ", ".join(str(each).removeprefix("torch.") for each in self.dtypes)
            return f"serves {served}, not {str(dtype).removeprefix('torch.')}"
        return self.unavailable()


# in order of preference
KERNELS: tuple[RowKernelRecord, ...] = (
    RowKernelRecord(
        "triton",
        "megatron_seqpar.memory.triton_cross_entropy",
        "TritonRows",
        ("cuda",),
        (torch.bfloat16, torch.float16, torch.float32),
        _no_triton,
    ),
    RowKernelRecord("torch", __name__, "TorchRows", None, None, _always),
)


@lru_cache(maxsize=64)
def choose(name: str, device: str, dtype: torch.dtype) -> RowKernel:
    """The kernel called `name`, or with "auto" the first of the table that serves such logits.

    Says in the log what "auto" took. Raises `KernelError` for an unknown name, or for one that
    does not serve them.
    """
    names = [record.name for record in KERNELS]
    if name != "auto" and name not in names:
        raise KernelError(f"loss kernel {name!r} is unknown; use auto, {', '.join(names)}")
    passed_over: list[str] = []
    for record in KERNELS:
        if name not in ("auto", record.name):
            continue
        reason = record.refuses(device, dtype)
        if reason is None:
            if name == "auto":
                because = f" ({'; '.join(passed_over)})" if passed_over else ""
                logger.info("loss kernel for %s %s: %s%s", device, dtype, record.name, because)
            kernel: RowKernel = getattr(import_module(record.module), record.attribute)()
            return kernel
        passed_over.append(f"{record.name} {reason}")
    raise KernelError(f"loss kernel {'; '.join(passed_over)}; use auto")
