# SPDX-License-Identifier: Apache-2.0
"""Run a schedule: the loop that both passes share, and what each pass computes, sends and merges.

Note: what is in flight
-----------------------
    post(t)      operands for step t+1, results of step t-1
    compute(t)   tiles, from local chunks and operands that arrived in earlier steps
    wait(t)      results that arrived are merged, operands are kept for step t+1

Buffers are plain allocations: on CUDA the caching allocator orders their reuse on the compute
stream, and a buffer is dropped only after `wait` has put that stream behind its transfer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from .ir import RETURNS, Key, Payload, Tile, Transfer
from .kernels import Kernel, TileCall
from .layouts import Span
from .merge import GradAccumulator, OutputAccumulator, accumulate_dtype
from .operands import Operands, Tensors
from .recorder import SILENT, Recorder
from .schedule import Schedule
from .transport import Message, Transport


@dataclass(frozen=True)
class Execution:
    """What both passes of one attention call share.

    Attributes:
        plan: the forward schedule.
        transport: the ranks of the SP axis.
        kernel: computes tiles.
        scale: multiplies q k^T.
        softcap: 0, or the cap of the scores: cap * tanh(scores / cap).
        deterministic: passed on to the kernel.
        overlap: False waits for the transfers of a step before computing it (to measure overlap).
        recorder: told what happens when.
    """

    plan: Schedule
    transport: Transport
    kernel: Kernel
    scale: float
    softcap: float = 0.0
    deterministic: bool = False
    overlap: bool = True
    recorder: Recorder = SILENT

    def call(self, tile: Tile) -> TileCall:
        """What the kernel is told about a tile, in positions counted from the tile's corner."""
        shift = tile.kv.start - tile.q.start
        low = None if tile.low is None else tile.low - shift
        high = None if tile.high is None else tile.high - shift
        return TileCall(self.scale, low, high, self.softcap, self.deterministic)

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(out `[b, s_local, h, dv]`, lse `[b, h, s_local]`) of this rank's queries.

        q `[b, s_local, h, dk]`, k and v `[b, s_local, hkv, dk or dv]`: this rank's tokens.
        sink `[h]`: the score of a key with value zero that every query sees.
        """
        work = _Forward(self, q, k, v)
        _run(self.plan, self, work)
        if sink is not None:
            work.sum.add_sink(sink)
        return work.sum.result()

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(dq, dk, dv) of this rank's tokens; arguments as `forward` took and returned them."""
        work = _Backward(self, dout, q, k, v, out, lse)
        _run(self.plan.backward(), self, work)
        return work.dq.result(), work.dk.result(), work.dv.result()


class _Pass(Protocol):
    operands: Operands

    def outgoing(self, transfer: Transfer) -> Tensors:
        """The tensors of a payload to send."""

    def buffers(self, transfer: Transfer) -> Tensors:
        """Empty tensors to receive a payload in."""

    def compute(self, tile: Tile) -> None:
        """Compute one tile."""

    def merge(self, transfer: Transfer, tensors: Tensors) -> None:
        """Take a result that arrived."""


def _run(plan: Schedule, run: Execution, work: _Pass) -> None:
    record, direction = run.recorder, plan.direction
    for index, step in enumerate(plan.steps(run.transport.rank)):
        moved = step.sends, step.receives
        with record.span("post", step=index, transfers=moved, direction=direction):
            sends = [
                Message(transfer.dst, tensor.contiguous(), transfer.payload.value)
                for transfer in step.sends
                for tensor in work.outgoing(transfer)
            ]
            arriving = [(transfer, work.buffers(transfer)) for transfer in step.receives]
            receives = [
                Message(transfer.src, tensor, transfer.payload.value)
                for transfer, tensors in arriving
                for tensor in tensors
            ]
            pending = run.transport.exchange(sends, receives)
        if not run.overlap:
            with record.span("wait", step=index, transfers=moved, direction=direction):
                pending.wait()
        for tile in step.tiles:
            with record.span("tile", step=index, tile=tile, direction=direction):
                work.compute(tile)
        if run.overlap:
            with record.span("wait", step=index, transfers=moved, direction=direction):
                pending.wait()
        with record.span("merge", step=index, direction=direction):
            for transfer, tensors in arriving:
                if transfer.payload in RETURNS:
                    work.merge(transfer, tensors)
                else:
                    work.operands.put(transfer.key, tensors)
        for key in step.frees:
            work.operands.free(key)


class _Results:
    """Partial results that this rank sums up for others, by what it will send."""

    def __init__(self, plan: Schedule, rank: int) -> None:
        self.spans: dict[tuple[Payload, Span], list[Span]] = {}
        for step in plan.steps(rank):
            for transfer in step.sends:
                if transfer.payload in RETURNS:
                    kind = transfer.payload, transfer.heads
                    self.spans.setdefault(kind, []).append(transfer.span)

    def parts(self, payload: Payload, span: Span, heads: Span) -> Iterator[tuple[Key, Span]]:
        """The results that `span` takes part in, each with the common range."""
        for there in self.spans.get((payload, heads), ()):
            part = there.meet(span)
            if part.size > 0:
                yield (payload, there, heads), part


class _Ranges:
    """What both passes know of ranges: the problem, this rank, its results for others."""

    def __init__(self, run: Execution, plan: Schedule) -> None:
        self.run, self.rank, self.problem = run, run.transport.rank, plan.problem
        self.results = _Results(plan, self.rank)

    def own_parts(self, span: Span) -> Iterator[tuple[slice, slice]]:
        """This rank's own tokens of `span`: (where in `span`, where in the local tensor)."""
        layout = self.problem.layout
        for owner, part in layout.split(span):
            if owner == self.rank:
                yield part.within(span), layout.local(self.rank, part)


class _Forward(_Ranges):
    def __init__(self, run: Execution, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        super().__init__(run, run.plan)
        self.q, self.k, self.v = q, k, v
        b, tokens, heads, _ = q.shape
        # its batch, dim, dtype and device are what accumulators are made of
        self.out_like = q.new_empty((b, 0, 0, v.shape[-1]))
        self.sum = OutputAccumulator(self.out_like, tokens, heads)
        self.for_others: dict[Key, OutputAccumulator] = {}
        self.operands = Operands(
            self.problem.layout,
            self.rank,
            {
                Payload.Q: lambda at, heads: (q[:, at, heads],),
                Payload.KV: lambda at, heads: (k[:, at, heads], v[:, at, heads]),
            },
        )

    def outgoing(self, transfer: Transfer) -> Tensors:
        if transfer.payload is Payload.OUT:
            return self.for_others.pop(transfer.key).result()
        return self.operands.get(*transfer.key)

    def buffers(self, transfer: Transfer) -> Tensors:
        b, size, heads = self.q.shape[0], transfer.span.size, transfer.heads.size
        if transfer.payload is Payload.KV:
            return tuple(t.new_empty((b, size, heads, t.shape[-1])) for t in (self.k, self.v))
        if transfer.payload is Payload.Q:
            return (self.q.new_empty((b, size, heads, self.q.shape[-1])),)
        stat = accumulate_dtype(self.q.dtype)
        out = self.q.new_empty((b, size, heads, self.v.shape[-1]))
        return out, self.q.new_empty((b, heads, size), dtype=stat)

    def compute(self, tile: Tile) -> None:
        (q,) = self.operands.get(Payload.Q, tile.q, tile.heads)
        k, v = self.operands.get(Payload.KV, tile.kv, self.problem.kv_range(tile.heads))
        out, lse = self.run.kernel.forward(q, k, v, self.run.call(tile))
        self.run.transport.counters.forward_calls += 1
        for there, here in self.own_parts(tile.q):
            self.sum.add(out[:, there], lse[:, :, there], here, slice(*tile.heads))
        for key, part in self.results.parts(Payload.OUT, tile.q, tile.heads):
            there = part.within(tile.q)
            if key not in self.for_others:
                self.for_others[key] = OutputAccumulator(
                    self.out_like, key[1].size, tile.heads.size
                )
            self.for_others[key].add(out[:, there], lse[:, :, there], part.within(key[1]))

    def merge(self, transfer: Transfer, tensors: Tensors) -> None:
        out, lse = tensors
        for there, here in self.own_parts(transfer.span):
            self.sum.add(out[:, there], lse[:, :, there], here, slice(*transfer.heads))


class _OwnQueries:
    """This rank's queries as Q-routes send them in backward: (q, dout, lse and delta).

    Apart from `_Backward`, which holds it: a method of that would close a circle, and all tensors
    of a backward pass would stay until Python's garbage collector happens to run.
    """

    def __init__(
        self, q: torch.Tensor, dout: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
    ) -> None:
        self.q, self.dout, self.out, self.lse = q, dout, out, lse
        self._delta: torch.Tensor | None = None

    @property
    def delta(self) -> torch.Tensor:
        """rowsum(dout * out), `[b, h, s_local]`, made when a Q-route first asks for it."""
        if self._delta is None:
            dtype = accumulate_dtype(self.q.dtype)
            product = self.dout.to(dtype) * self.out.to(dtype)
            self._delta = product.sum(-1).transpose(1, 2)
        return self._delta

    def __call__(self, at: slice, heads: slice) -> Tensors:
        stats = torch.stack((self.lse[:, heads, at], self.delta[:, heads, at]))
        return self.q[:, at, heads], self.dout[:, at, heads], stats


class _Backward(_Ranges):
    def __init__(
        self,
        run: Execution,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
    ) -> None:
        super().__init__(run, run.plan.backward())
        self.q, self.k, self.v, self.dout, self.out, self.lse = q, k, v, dout, out, lse
        self.dq, self.dk, self.dv = (GradAccumulator(t, *t.shape[1:3]) for t in (q, k, v))
        self.for_others: dict[Key, tuple[GradAccumulator, ...]] = {}
        self.operands = Operands(
            self.problem.layout,
            self.rank,
            {
                Payload.Q_GRAD: _OwnQueries(q, dout, out, lse),
                Payload.KV: lambda at, heads: (k[:, at, heads], v[:, at, heads]),
            },
        )

    def outgoing(self, transfer: Transfer) -> Tensors:
        if transfer.payload in RETURNS:
            return tuple(total.result() for total in self.for_others.pop(transfer.key))
        return self.operands.get(*transfer.key)

    def buffers(self, transfer: Transfer) -> Tensors:
        b, size, heads = self.q.shape[0], transfer.span.size, transfer.heads.size
        kinds: Tensors = (self.q,)
        if transfer.payload in (Payload.KV, Payload.DKV):
            kinds = self.k, self.v
        elif transfer.payload is Payload.Q_GRAD:
            kinds = self.q, self.dout
        tensors = tuple(t.new_empty((b, size, heads, t.shape[-1])) for t in kinds)
        if transfer.payload is Payload.Q_GRAD:
            return *tensors, self.lse.new_empty((2, b, heads, size))
        return tensors

    def _queries(self, tile: Tile) -> Tensors:
        """(q, dout, out, lse) of the tile's queries."""
        own = self.operands.local(tile.q) if self.problem.layout.owns(self.rank, tile.q) else []
        if len(own) == 1:
            at, heads = own[0], slice(*tile.heads)
            return (*(t[:, at, heads] for t in (self.q, self.dout, self.out)),
                    self.lse[:, heads, at])  # fmt: skip
        q, dout, stats = self.operands.get(Payload.Q_GRAD, tile.q, tile.heads)
        return q, dout, output_with_delta(dout, stats[1]), stats[0]

    def compute(self, tile: Tile) -> None:
        q, dout, out, lse = self._queries(tile)
        kv_heads = self.problem.kv_range(tile.heads)
        k, v = self.operands.get(Payload.KV, tile.kv, kv_heads)
        dq, dk, dv = self.run.kernel.backward(dout, q, k, v, out, lse, self.run.call(tile))
        self.run.transport.counters.backward_calls += 1
        self._sum_up(Payload.DQ, (dq,), tile.q, tile.heads)
        self._sum_up(Payload.DKV, (dk, dv), tile.kv, kv_heads)

    def merge(self, transfer: Transfer, tensors: Tensors) -> None:
        self._sum_up(transfer.payload, tensors, transfer.span, transfer.heads)

    def _sum_up(self, payload: Payload, grads: Tensors, span: Span, heads: Span) -> None:
        """Add gradients of a token range to this rank's own and to those it sums up for others."""
        own, like = ((self.dq,), (self.q,)) if payload is Payload.DQ else (
            (self.dk, self.dv), (self.k, self.v))  # fmt: skip
        for there, here in self.own_parts(span):
            for total, grad in zip(own, grads, strict=True):
                total.add(grad[:, there], here, slice(*heads))
        for key, part in self.results.parts(payload, span, heads):
            if key not in self.for_others:
                self.for_others[key] = tuple(
                    GradAccumulator(t, key[1].size, heads.size) for t in like
                )
            for total, grad in zip(self.for_others[key], grads, strict=True):
                total.add(grad[:, part.within(span)], part.within(key[1]))


def output_with_delta(dout: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """A stand-in for the attention output: any tensor with rowsum(dout * it) == delta.

    Backward kernels use the output only to form delta, so a Q-route sends delta (one number a row
    and head) instead of the output. Among all such tensors this is the shortest, dout * delta /
    |dout|^2, never longer than the true output, so it rounds no worse in low precision.

    Args:
        dout: `[b, s, h, dv]`.
        delta: `[b, h, s]`, fp32 or fp64.

    Returns:
        `[b, s, h, dv]` in the dtype of `dout`; 0 where `dout` is 0 (then delta is 0 as well).
    """
    wide = dout.to(delta.dtype)
    # by the largest element first: squares of small gradients would underflow
    unit = wide.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(delta.dtype).tiny)
    wide = wide / unit
    square = wide.square().sum(-1, keepdim=True).clamp_min(torch.finfo(delta.dtype).tiny)
    factor = delta.transpose(1, 2).unsqueeze(-1) / unit / square
    return (wide * factor).to(dout.dtype)
