# SPDX-License-Identifier: Apache-2.0
"""Hand-made plans on a cluster of round numbers: a pair takes a second, a token of KV as well."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from math import inf
from typing import NamedTuple

from megatron_seqpar.attention.ir import Direction, Payload, Problem, Step, Tile, Transfer
from megatron_seqpar.attention.layouts import Span, TokenLayout
from megatron_seqpar.attention.masks import Full
from megatron_seqpar.attention.placement import Placement
from megatron_seqpar.attention.schedule import Schedule
from megatron_seqpar.simulate.cluster import (
    Basis,
    Cluster,
    Curve,
    Device,
    Figure,
    Figures,
    Kernel,
    Link,
    LinkKind,
)

ONE_HEAD = Span(0, 1)


def number(value: float) -> Figure:
    """A figure that a test made up."""
    return Figure(value, Basis.ASSUMED, "a test")


def curve(
    launch: float = 0.0,
    share: float = 1.0,
    half_rows: float = 0.0,
    half_keys: float = 0.0,
) -> Curve:
    """By default, no loss at all."""
    return Curve(number(launch), {128: number(share)}, number(half_rows), number(half_keys))


def cluster(
    *,
    ranks_per_node: int = 8,
    bandwidth: float = 4.0,
    network: float = 4.0,
    latency: float = 0.0,
    adapters: int = 8,
    overhead: float = 0.0,
    duplex: bool = True,
    one_port: bool = False,
    tax: float = 0.0,
    kernel: Curve | None = None,
    memory: float = inf,
    small_kernel: float = 0.0,
) -> Cluster:
    """A pair of one head of dim 1 takes 1 s, a token of its keys and values in bfloat16 1 s."""
    same = kernel or curve()
    return Cluster(
        name="round",
        ranks_per_node=number(ranks_per_node),
        device=Device(
            name="a device",
            peak=Figures({"bfloat16": 4.0, "float32": 4.0}, Basis.ASSUMED, "a test"),
            memory=number(memory),
            small_kernel=number(small_kernel),
        ),
        kernel=Kernel(same, same, same, same),
        intra=Link(LinkKind.NVSWITCH, number(bandwidth), number(1.0), number(latency)),
        inter=Link(LinkKind.NETWORK, number(network), number(1.0), number(latency)),
        adapters=number(adapters),
        message_overhead=number(overhead),
        duplex=duplex,
        one_port=one_port,
        overlap_tax=number(tax),
    )


class Move(NamedTuple):
    """KV of `tokens` tokens from one rank to another, posted by both at `step`.

    `received` is the step at which the receiver posts it, where that is another one.
    """

    step: int
    src: int
    dst: int
    tokens: int
    received: int | None = None


class Work(NamedTuple):
    """A full tile of `pairs` pairs (one query) that a rank computes at `step`."""

    step: int
    rank: int
    pairs: int


def tile(pairs: int, queries: int = 1, heads: int = 1) -> Tile:
    """A full tile."""
    return Tile(Span(0, queries), Span(0, pairs // queries), Span(0, heads), None, None, pairs)


def schedule(
    size: int,
    work: Iterable[Work],
    moves: Iterable[Move],
    direction: Direction = "forward",
) -> Schedule:
    """A plan made by hand: it need not compute attention, only keep ranks and links busy."""
    work, moves = list(work), list(moves)
    steps = 1 + max([0, *(w.step for w in work), *(m.step for m in moves)])
    made: dict[tuple[int, int], dict[str, list]] = defaultdict(  # type: ignore[type-arg]
        lambda: {"tiles": [], "sends": [], "receives": []}
    )
    for w in work:
        made[w.rank, w.step]["tiles"].append(tile(w.pairs))
    for index, m in enumerate(moves):
        # ranges that differ, so that mixed up transfers are seen
        span = Span(1000 * index, 1000 * index + m.tokens)
        transfer = Transfer(Payload.KV, span, m.src, m.dst, ONE_HEAD)
        made[m.src, m.step]["sends"].append(transfer)
        received = m.step if m.received is None else m.received
        made[m.dst, received]["receives"].append(transfer)
    plan = tuple(
        tuple(
            Step(**{name: tuple(parts) for name, parts in made[rank, step].items()})
            for step in range(steps)
        )
        for rank in range(size)
    )
    problem = Problem(
        TokenLayout.contiguous(size, seq_length=1000 * size), Full(), query_heads=1, kv_heads=1,
        head_dim=1, value_dim=1,
    )  # fmt: skip
    return Schedule("by hand", direction, problem, plan, (), Placement([]))


def faster(one: Cluster, factor: float) -> Cluster:
    """The same cluster with all links `factor` times as fast."""
    intra, inter = (
        replace(link, line_rate=number(link.line_rate.value * factor))
        for link in (one.intra, one.inter)
    )
    return replace(one, intra=intra, inter=inter)
