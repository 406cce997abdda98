# SPDX-License-Identifier: Apache-2.0
"""LM head and cross entropy, piece by piece: the logits of a whole sequence never exist.

For a vocabulary of V and s tokens, logits, their softmax and its gradient are by far the largest
tensors of a training step. Each token's loss needs only that token's row, so forward takes a piece
of the hidden states at a time, multiplies it with the head, keeps two numbers a token, the loss and
the log-sum-exp of its logits, and lets the logits go. Backward multiplies again, turns the logits
into their gradient in place with the kept log-sum-exp, and hands it to the head (Mini-Sequence
Transformer, arXiv 2407.15892, section 3.2). That is one more product with the head than without
pieces, and nothing is sent for the softmax in backward.

Kept: hidden states `[s, b, h]`, which the head keeps in any case, labels, and a log-sum-exp a
token. Comes and goes: `[s / chunks, b, V]` of logits, and the head's gradient in fp32
(`GradientSum`).

**Vocabulary over ranks.** Each rank holds V / ranks logits of every token. A piece's forward makes
two all-reduces over the group: of the largest logits, then of sums and label logits together (a
third one when predictions are asked for).

**Sequence over the same ranks** (TP-SP). The hidden states are the rank's share, the labels those
of all ranks in rank order, and `project` gathers: a piece holds the same rows of every rank's
share.

**Labels outside of the vocabulary**, such as -100, get what Megatron's loss gives them: the loss is
log-sum-exp minus largest logit, the gradient the softmax. Callers mask both.

Megatron has no flag that gives the language model's loss label smoothing or a z-loss (checked in
megatron-core 0.16.1 and 0.19.2), so neither exists here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from megatron_seqpar.memory.chunked import GradientSum, never_elsewhere
from megatron_seqpar.memory.logit_rows import RowKernel, Statistics, choose, own, wide
from megatron_seqpar.memory.spans import spans

Group = dist.ProcessGroup | None


@dataclass(frozen=True)
class ChunkedLoss:
    """What `chunked_cross_entropy` returns.

    loss: `[s, b]`, fp32 (fp64 for fp64 logits).
    predictions: of every token the id of the largest logit, the first one of equal ones, `[s, b]`
        int64, or None if not asked for.
    """

    loss: torch.Tensor
    predictions: torch.Tensor | None


def chunked_cross_entropy(
    project: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    labels: torch.Tensor,
    parameters: Sequence[torch.Tensor] = (),
    *,
    chunks: int,
    group: Group = None,
    predictions: bool = False,
    elsewhere: Callable[[torch.Tensor], bool] = never_elsewhere,
    kernel: str = "auto",
) -> ChunkedLoss:
    """The cross entropy of `project(hidden)` with `labels`, in `chunks` pieces of the sequence.

    project: `[n, b, h] -> [n * shares, b, V / ranks]`, each token's logits from its hidden state
        alone; with shares > 1 it gathers them from all ranks, rank by rank. It runs twice a piece.
        What it returns is overwritten, so its last operation must not keep its own output.
    hidden: `[s / shares, b, h]`.
    labels: `[s, b]`, integers. The ratio of their lengths says how many shares there are.
    parameters: tensors besides `hidden` that project uses and that may want a gradient.
    chunks: pieces, 1 or more; with fewer rows, a piece a row. Lengths need not divide.
    group: ranks that hold parts of the vocabulary, equal ones in rank order; None for one part.
    predictions: find the largest logit as well.
    elsewhere: see `GradientSum`.
    kernel: a name of `logit_rows.KERNELS`, or auto.

    Raises ValueError for labels that do not fit the hidden states, or logits that do not fit the
    labels; `KernelError` for a kernel that does not serve these logits.
    """
    rows, batch = hidden.shape[:2]
    ranks = 1 if group is None else dist.get_world_size(group)
    shares = labels.shape[0] // rows if rows else 1
    if labels.shape != (rows * shares, batch) or shares not in (1, ranks):
        raise ValueError(
            f"labels {tuple(labels.shape)} do not fit hidden states {tuple(hidden.shape)}: with "
            f"the vocabulary over {ranks} ranks there must be as many, or {ranks} times as many"
        )
    device = hidden.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    task = _Task(
        project,
        tuple(parameters),
        spans(rows, chunks),
        shares,
        group if ranks > 1 else None,
        predictions,
        elsewhere,
        kernel,
        autocast,
    )
    loss, found = _ChunkedCrossEntropy.apply(task, hidden, labels.long(), *parameters)
    return ChunkedLoss(loss, found if predictions else None)


@dataclass(frozen=True)
class _Task:
    """What one call of `chunked_cross_entropy` was asked for."""

    project: Callable[[torch.Tensor], torch.Tensor]
    parameters: tuple[torch.Tensor, ...]
    spans: list[tuple[int, int]]
    shares: int
    group: Group
    predictions: bool
    elsewhere: Callable[[torch.Tensor], bool]
    kernel: str
    autocast: torch.dtype | None

    def logits(self, piece: torch.Tensor) -> torch.Tensor:
        """A piece's logits, under the autocast state of the call.

        Without autocast's cache: a weight cast while nothing is recorded would be found again by a
        piece that is, and get no gradient.
        """
        with torch.autocast(
            piece.device.type,
            enabled=self.autocast is not None,
            dtype=self.autocast,
            cache_enabled=False,
        ):
            out = self.project(piece)
        expected = (piece.shape[0] * self.shares, piece.shape[1])
        if out.shape[:-1] != expected:
            raise ValueError(f"logits {tuple(out.shape)} where {(*expected, 'V')} were expected")
        return out.contiguous()

    def of(self, whole: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """The rows of `whole`, `[s, b]`, that belong to a piece: a view `[shares, n, b]`."""
        return whole.unflatten(0, (self.shares, -1))[:, start:stop]

    def first(self, size: int) -> int:
        """The first id of this rank's part of the vocabulary, of `size` logits."""
        return 0 if self.group is None else dist.get_rank(self.group) * size

    def rows(self, logits: torch.Tensor) -> RowKernel:
        return choose(self.kernel, logits.device.type, logits.dtype)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The node behind `chunked_cross_entropy`; inputs: hidden states, labels, parameters."""

    @staticmethod
    def forward(
        ctx: Any,
        task: _Task,
        hidden: torch.Tensor,
        labels: torch.Tensor,
        *parameters: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        loss = lse = hidden.new_empty(0)
        found = labels.new_empty(labels.shape if task.predictions else 0)
        for index, (start, stop) in enumerate(task.spans):
            logits = task.logits(hidden[start:stop])
            if index == 0:
                loss = hidden.new_empty(labels.shape, dtype=wide(logits.dtype))
                lse = torch.empty_like(loss)
            size = logits.shape[-1]
            local = task.of(labels, start, stop).flatten() - task.first(size)
            statistics = task.rows(logits).statistics(logits.flatten(0, 1), local, task.predictions)
            del logits
            results = _over_vocabulary(statistics, own(local, size), size, task)
            for whole, part in zip((loss, lse, found), results, strict=True):
                if part is not None:
                    place = task.of(whole, start, stop)
                    place.copy_(part.view(place.shape))
        ctx.task = task
        # Parameters are not saved: `project` finds them itself, and data parallelism may write them
        # anew in between, which autograd would take for a mistake.
        ctx.save_for_backward(hidden, labels, lse)
        ctx.mark_non_differentiable(found)
        return loss, found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[Any, ...]:
        task: _Task = ctx.task
        hidden, labels, lse = ctx.saved_tensors
        _, wants_hidden, _, *wants = ctx.needs_input_grad
        wanted = [p for p, needed in zip(task.parameters, wants, strict=True) if needed]
        sums = GradientSum(wanted, task.elsewhere)
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        for start, stop in task.spans:
            piece = hidden[start:stop].detach().requires_grad_(wants_hidden)
            with torch.enable_grad():
                logits = task.logits(piece)
            found: Sequence[torch.Tensor | None] = _gradients(
                task,
                logits,
                [piece, *wanted] if wants_hidden else wanted,
                *(task.of(whole, start, stop).flatten() for whole in (labels, lse, grad)),
            )
            # Before the next piece runs, nothing of this one may be left.
            del logits, piece
            if grad_hidden is not None:
                first, *found = found
                grad_hidden[start:stop] = 0 if first is None else first
                del first
            sums.add(found)
            del found
        results = iter(sums.result())
        return None, grad_hidden, None, *(next(results) if needed else None for needed in wants)


def _gradients(
    task: _Task,
    logits: torch.Tensor,
    inputs: list[torch.Tensor],
    labels: torch.Tensor,
    lse: torch.Tensor,
    grad: torch.Tensor,
) -> Sequence[torch.Tensor | None]:
    """Gradients of a piece's inputs; overwrites its logits. labels, lse, grad: `[n]`."""
    if not logits.requires_grad:
        return [None] * len(inputs)
    size = logits.shape[-1]
    flat = logits.detach().flatten(0, 1)
    rows = task.rows(logits)
    flat = rows.gradient(flat, labels - task.first(size), lse, grad)
    return torch.autograd.grad(logits, inputs, flat.view(logits.shape), allow_unused=True)


def _over_vocabulary(
    part: Statistics, here: torch.Tensor, size: int, task: _Task
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Loss, log-sum-exp and prediction of n rows, `[n]` each, from each rank's part.

    here: which rows have their label in this rank's part of `size` logits.
    """
    maximum, total, found = part.maximum, part.total, part.winner
    if task.group is not None:
        maximum = maximum.clone()
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=task.group)
        total = total * torch.exp(part.maximum - maximum)
    target = torch.where(here, part.target - maximum, 0.0)
    if task.group is not None:
        sums = torch.stack([total, target])
        dist.all_reduce(sums, group=task.group)
        total, target = sums.unbind()
        if found is not None:
            # Among equal logits the first of the vocabulary, as argmax takes it.
            none = torch.iinfo(found.dtype).max
            found = torch.where(part.maximum == maximum, found + task.first(size), none)
            dist.all_reduce(found, op=dist.ReduceOp.MIN, group=task.group)
    log_total = total.log()
    return log_total - target, log_total + maximum, found
