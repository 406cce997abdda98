# SPDX-License-Identifier: Apache-2.0
"""Run a schedule: the loop that both passes share, and what each pass computes, sends and merges.

Note: what is in flight
-----------------------
    post(t)      operands for step t+1, results of step t-1
    compute(t)   tiles, from local chunks and operands that arrived in earlier steps
    wait(t)      results that arrived are merged, operands are kept for step t+1

Buffers are plain allocations: on CUDA the caching allocator orders their reuse on the compute
stream,
and a buffer is dropped only after `wait` has put that stream behind its transfer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from .ir import RETURNS, Payload, Tile, Transfer
from .kernels import Kernel, TileCall
from .layouts import Span
from .masks import TileKind
from .merge import GradAccumulator, OutputAccumulator, accumulate_dtype
from .schedule import Schedule
from .transport import Message, Transport

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Execution:
    """What both passes of one attention call share.

    Attributes:
        plan: the forward schedule.
        transport: the ranks of the SP axis.
        kernel: computes tiles.
        scale: multiplies q k^T.
        deterministic: passed on to the kernel.
        overlap: False waits for the transfers of a step before computing it (to measure overlap).
    """

    plan: Schedule
    transport: Transport
    kernel: Kernel
    scale: float
    deterministic: bool = False
    overlap: bool = True

    def call(self, tile: Tile) -> TileCall:
        """What the kernel is told about a tile."""
        return TileCall(self.scale, tile.kind is TileKind.CAUSAL, self.deterministic)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Tensors:
        """(out `[b, s_local, h, dv]`, lse `[b, h, s_local]`) of this rank's queries.

        q `[b, s_local, h, dk]`, k and v `[b, s_local, hkv, dk or dv]`: this rank's chunk.
        """
        work = _Forward(self, q, k, v)
        _run(self.plan, self.transport, work, self.overlap)
        return work.local.result()

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
    ) -> Tensors:
        """(dq, dk, dv) of this rank's chunk; arguments as `forward` took and returned them."""
        work = _Backward(self, dout, q, k, v, out, lse)
        _run(self.plan.backward(), self.transport, work, self.overlap)
        return work.dq.result(), work.dk.result(), work.dv.result()


class _Pass(Protocol):
    held: dict[tuple[Payload, Span], Tensors]

    def outgoing(self, transfer: Transfer) -> Tensors:
        """The tensors of a payload to send."""

    def buffers(self, transfer: Transfer) -> Tensors:
        """Empty tensors to receive a payload in."""

    def compute(self, tile: Tile) -> None:
        """Compute one tile."""

    def merge(self, transfer: Transfer, tensors: Tensors) -> None:
        """Take a result that arrived."""


def _run(plan: Schedule, transport: Transport, work: _Pass, overlap: bool) -> None:
    for step in plan.steps(transport.rank):
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
        pending = transport.exchange(sends, receives)
        if not overlap:
            pending.wait()
        for tile in step.tiles:
            work.compute(tile)
        if overlap:
            pending.wait()
        for transfer, tensors in arriving:
            if transfer.payload in RETURNS:
                work.merge(transfer, tensors)
            else:
                work.held[transfer.payload, transfer.span] = tensors
        for key in step.frees:
            del work.held[key]


class _Chunk:
    """This rank's local tensors and where a span lies in them."""

    def __init__(self, run: Execution, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        self.run, self.rank = run, run.transport.rank
        self.layout = run.plan.problem.layout
        self.q, self.k, self.v = q, k, v
        self.held: dict[tuple[Payload, Span], Tensors] = {}

    def at(self, span: Span) -> slice:
        return self.layout.local(self.rank, span)

    def keys_values(self, span: Span, owner: int) -> Tensors:
        if owner != self.rank:
            return self.held[Payload.KV, span]
        return self.k[:, self.at(span)], self.v[:, self.at(span)]

    def empty(self, like: torch.Tensor, span: Span) -> torch.Tensor:
        b, _, h, d = like.shape
        return like.new_empty((b, span.size, h, d))


class _Forward(_Chunk):
    def __init__(self, run: Execution, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        super().__init__(run, q, k, v)
        self.local = OutputAccumulator(q.shape[1], q.dtype)
        self.for_others: dict[Span, OutputAccumulator] = {}

    def outgoing(self, transfer: Transfer) -> Tensors:
        span = transfer.span
        if transfer.payload is Payload.KV:
            return self.keys_values(span, self.layout.owner(span))
        if transfer.payload is Payload.Q:
            return (self.q[:, self.at(span)],)
        return self.for_others.pop(span).result()

    def buffers(self, transfer: Transfer) -> Tensors:
        span = transfer.span
        if transfer.payload is Payload.KV:
            return self.empty(self.k, span), self.empty(self.v, span)
        if transfer.payload is Payload.Q:
            return (self.empty(self.q, span),)
        b, _, h, _ = self.q.shape
        lse = self.q.new_empty((b, h, span.size), dtype=accumulate_dtype(self.q.dtype))
        return self.q.new_empty((b, span.size, h, self.v.shape[-1])), lse

    def compute(self, tile: Tile) -> None:
        k, v = self.keys_values(tile.kv, tile.kv_owner)
        mine = tile.q_owner == self.rank
        q = self.q[:, self.at(tile.q)] if mine else self.held[Payload.Q, tile.q][0]
        out, lse = self.run.kernel.forward(q, k, v, self.run.call(tile))
        self.run.transport.counters.forward_calls += 1
        if mine:
            self.local.add(out, lse, self.at(tile.q))
            return
        partial = self.for_others.setdefault(tile.q, OutputAccumulator(tile.q.size, q.dtype))
        partial.add(out, lse, slice(None))

    def merge(self, transfer: Transfer, tensors: Tensors) -> None:
        out, lse = tensors
        self.local.add(out, lse, self.at(transfer.span))


class _Backward(_Chunk):
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
        super().__init__(run, q, k, v)
        self.dout, self.out, self.lse = dout, out, lse
        self._delta: torch.Tensor | None = None
        tokens = q.shape[1]
        self.dq = GradAccumulator(tokens, q.dtype)
        self.dk, self.dv = GradAccumulator(tokens, k.dtype), GradAccumulator(tokens, v.dtype)
        self.dq_for_others: dict[Span, GradAccumulator] = {}
        self.dkv_for_others: dict[Span, tuple[GradAccumulator, GradAccumulator]] = {}

    @property
    def delta(self) -> torch.Tensor:
        """rowsum(dout * out), `[b, h, s_local]`, made when a Q-route first asks for it."""
        if self._delta is None:
            dtype = accumulate_dtype(self.q.dtype)
            product = self.dout.to(dtype) * self.out.to(dtype)
            self._delta = product.sum(-1).transpose(1, 2)
        return self._delta

    def outgoing(self, transfer: Transfer) -> Tensors:
        span = transfer.span
        if transfer.payload is Payload.KV:
            return self.keys_values(span, self.layout.owner(span))
        if transfer.payload is Payload.Q_GRAD:
            at = self.at(span)
            stats = torch.stack((self.lse[:, :, at], self.delta[:, :, at]))
            return self.q[:, at], self.dout[:, at], stats
        if transfer.payload is Payload.DQ:
            return (self.dq_for_others.pop(span).result(),)
        dk, dv = self.dkv_for_others.pop(span)
        return dk.result(), dv.result()

    def buffers(self, transfer: Transfer) -> Tensors:
        span = transfer.span
        if transfer.payload is Payload.DQ:
            return (self.empty(self.q, span),)
        if transfer.payload is Payload.Q_GRAD:
            b, _, h, _ = self.q.shape
            stats = self.lse.new_empty((2, b, h, span.size))
            return self.empty(self.q, span), self.empty(self.dout, span), stats
        return self.empty(self.k, span), self.empty(self.v, span)

    def _queries(self, tile: Tile) -> Tensors:
        """(q, dout, out, lse) of the tile's queries."""
        if tile.q_owner == self.rank:
            at = self.at(tile.q)
            return self.q[:, at], self.dout[:, at], self.out[:, at], self.lse[:, :, at]
        q, dout, stats = self.held[Payload.Q_GRAD, tile.q]
        return q, dout, output_with_delta(dout, stats[1]), stats[0]

    def compute(self, tile: Tile) -> None:
        q, dout, out, lse = self._queries(tile)
        k, v = self.keys_values(tile.kv, tile.kv_owner)
        dq, dk, dv = self.run.kernel.backward(dout, q, k, v, out, lse, self.run.call(tile))
        self.run.transport.counters.backward_calls += 1
        if tile.q_owner == self.rank:
            self.dq.add(dq, self.at(tile.q))
        else:
            total = self.dq_for_others.setdefault(tile.q, GradAccumulator(tile.q.size, q.dtype))
            total.add(dq, slice(None))
        if tile.kv_owner == self.rank:
            self.dk.add(dk, self.at(tile.kv))
            self.dv.add(dv, self.at(tile.kv))
        else:
            if tile.kv not in self.dkv_for_others:
                size = tile.kv.size
                self.dkv_for_others[tile.kv] = (
                    GradAccumulator(size, k.dtype),
                    GradAccumulator(size, v.dtype),
                )
            total_dk, total_dv = self.dkv_for_others[tile.kv]
            total_dk.add(dk, slice(None))
            total_dv.add(dv, slice(None))

    def merge(self, transfer: Transfer, tensors: Tensors) -> None:
        at = self.at(transfer.span)
        if transfer.payload is Payload.DQ:
            self.dq.add(tensors[0], at)
        else:
            self.dk.add(tensors[0], at)
            self.dv.add(tensors[1], at)


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
