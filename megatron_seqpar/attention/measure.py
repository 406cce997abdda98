# SPDX-License-Identifier: Apache-2.0
"""Measure this machine: seconds of the attention kernel on a few tiles, of messages between ranks.

The rows are what `megatron_seqpar.simulate.calibrate` fits a cluster's numbers to. Medians of a few
calls are taken; whatever else runs on the machine is in them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
import torch.distributed as dist

from ..simulate.calibrate import LinkRow, TileRow
from .ir import Direction
from .kernels import TileCall, select
from .recorder import clock_of
from .transport import Message, Transport, transport_of


class Shape(NamedTuple):
    """A tile to measure; `causal` tiles are squares on the diagonal."""

    sq: int
    skv: int
    causal: bool = False

    @property
    def pairs(self) -> int:
        """Interacting (query, key) pairs."""
        return self.sq * (self.sq + 1) // 2 if self.causal else self.sq * self.skv


def shapes_up_to(tokens: int) -> tuple[Shape, ...]:
    """Squares, flat and tall tiles from an eighth of `tokens` to `tokens`, full and causal."""
    sizes = [max(1, tokens // part) for part in (8, 4, 2, 1)]
    squares = [Shape(size, size) for size in sizes]
    oblong = [Shape(sizes[0], tokens), Shape(tokens, sizes[0])]
    return (*squares, *oblong, *(Shape(size, size, True) for size in sizes))


def measure_tiles(
    shapes: Iterable[Shape],
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    kernel: str = "auto",
    heads: int = 8,
    kv_heads: int | None = None,
    head_dim: int = 128,
    value_dim: int | None = None,
    batch: int = 1,
    repeats: int = 5,
) -> list[TileRow]:
    """Seconds of the kernel on tiles, forward and backward.

    Args:
        shapes: the tiles; `shapes_up_to` makes a good set.
        device, dtype, kernel: what runs; `KernelError` when no kernel serves them.
        heads, kv_heads, head_dim, value_dim, batch: sizes of the tensors; kv_heads is `heads` and
            value_dim `head_dim` by default.
        repeats: calls of which the median is taken, after one that is not counted.
    """
    device = torch.device(device)
    kv_heads, value_dim = kv_heads or heads, value_dim or head_dim
    _, chosen = select(kernel, device=device, dtype=dtype, head_dim=head_dim, value_dim=value_dim)
    generator = torch.Generator(device).manual_seed(0)

    def normal(tokens: int, count: int, dim: int) -> torch.Tensor:
        sizes = (batch, tokens, count, dim)
        return torch.randn(sizes, generator=generator, device=device, dtype=dtype)

    rows = []
    for shape in shapes:
        q, k = normal(shape.sq, heads, head_dim), normal(shape.skv, kv_heads, head_dim)
        v, dout = normal(shape.skv, kv_heads, value_dim), normal(shape.sq, heads, value_dim)
        call = TileCall(head_dim**-0.5, None, 0 if shape.causal else None)
        out, lse = chosen.forward(q, k, v, call)
        calls: tuple[tuple[Direction, Callable[[], object]], ...] = (
            ("forward", partial(chosen.forward, q, k, v, call)),
            ("backward", partial(chosen.backward, dout, q, k, v, out, lse, call)),
        )
        for direction, once in calls:
            row = TileRow(
                direction=direction,
                sq=shape.sq,
                skv=shape.skv,
                pairs=shape.pairs,
                heads=heads,
                head_dim=head_dim,
                value_dim=value_dim,
                batch=batch,
                dtype=str(dtype).removeprefix("torch."),
                seconds=_median_seconds(once, device, repeats),
            )
            rows.append(row)
    return rows


def measure_links(
    group: dist.ProcessGroup | Transport | None = None,
    *,
    sizes: Iterable[int] = (1 << 10, 1 << 16, 1 << 20, 1 << 22, 1 << 24),
    device: torch.device | str = "cpu",
    node_size: int | None = None,
    repeats: int = 5,
) -> list[LinkRow]:
    """Seconds of messages of `sizes` bytes, one way; every rank of the group calls this.

    Rank 0 plays ping-pong with rank 1 and, with several nodes, with the first rank of the second
    node. Half a round trip counts: it holds what both ends take to notice that a message is there.

    Args:
        group: as `dist_flash_attention` takes it.
        sizes: of the messages.
        device: where the messages lie.
        node_size: ranks of a node, consecutive; None for all of them.
        repeats: round trips of which the median is taken, after one that is not counted.

    Returns:
        The rows on rank 0, nothing elsewhere.
    """
    device, transport = torch.device(device), transport_of(group)
    node_size = node_size or transport.size
    transport.prepare(device)
    peers = {peer for peer in (1, node_size) if peer < transport.size}
    rows = []
    for peer in sorted(peers):
        for size in sizes:
            if transport.rank in (0, peer):
                seconds = _round_trip(transport, peer, size, device, repeats)
                rows.append(LinkRow(size, seconds / 2, within_node=peer < node_size))
        transport.gather_lengths(0, device)  # the ranks that had nothing to do wait here
    return rows if transport.rank == 0 else []


def _round_trip(
    transport: Transport, peer: int, size: int, device: torch.device, repeats: int
) -> float:
    message = torch.zeros(size, dtype=torch.uint8, device=device)
    other = 0 if transport.rank == peer else peer

    def trip() -> None:
        ball = [Message(other, message, "measure")]
        starts = transport.rank == 0
        transport.exchange(ball if starts else [], [] if starts else ball).wait()
        transport.exchange([] if starts else ball, ball if starts else []).wait()

    return _median_seconds(trip, device, repeats)


def _median_seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time of `work`; on CUDA as the stream sees it."""
    clock = clock_of(device.type)
    work()
    marks = []
    for _ in range(repeats):
        begin = clock.mark()
        work()
        marks.append((begin, clock.mark()))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return median((clock.at(end) - clock.at(begin)) / 1e9 for begin, end in marks)
