# SPDX-License-Identifier: Apache-2.0
"""From placed rectangles to a plan: cut them into tiles, derive every transfer of one pass.

A builder only says which rank computes which rectangle at which step. What must move follows:

* operands that the computing rank does not own are fetched one step before their first use, each
  token once, only those that a tile needs, straight from their owner, and freed after their last
  use;
* results that belong to another rank are summed up where they are computed and returned once, one
  step after their last tile: (out, LSE) in the forward pass, dq and (dk, dv) in the backward pass.

Two things change the routes of keys and values: a builder may relay them itself, and where several
ranks of a node need the same ones of another node, they may cross once, to a *gateway* rank that
passes them on (and sums up the gradients that go back).

The backward plan therefore needs no rules of its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

from ..errors import ScheduleError
from .ir import Direction, Key, Payload, Placed, Plan, Problem, Step, Tile, Transfer
from .layouts import Span


class PlacedTile(NamedTuple):
    """A tile, who computes it and when."""

    step: int
    rank: int
    tile: Tile


def cut_tiles(problem: Problem, placed: Iterable[Placed]) -> tuple[PlacedTile, ...]:
    """The tiles of placed rectangles; what no pair of the mask lies in is dropped."""
    return tuple(
        PlacedTile(
            p.step,
            p.rank,
            Tile(part.q, part.kv, p.heads or problem.all_heads, part.low, part.high, part.pairs),
        )
        for p in placed
        for part in problem.index.clip(p.q, p.kv)
    )


def assemble(
    problem: Problem,
    tiles: Sequence[PlacedTile],
    *,
    relay: Sequence[tuple[int, Transfer]] | None = None,
    gateways: bool = False,
    direction: Direction = "forward",
) -> Plan:
    """Build the plan of one pass from placed tiles.

    Args:
        problem: sizes, token layout and mask.
        tiles: by step and rank.
        relay: KV transfers `(step, transfer)` that replace the direct ones, for builders in which
            ranks pass on what they received.
        gateways: whether keys and values cross between nodes once a node.
        direction: which pass.

    Raises:
        ScheduleError: heads that a kernel cannot serve in one call, or a relay that does not bring
            what a tile needs.
    """
    return _Assembly(problem, tiles, relay, gateways, direction).build()


class _Need(NamedTuple):
    """A token range that a rank needs from its owner, or owes to it, at a step."""

    span: Span
    owner: int
    step: int


class _Assembly:
    """Working state of one `assemble` call."""

    def __init__(
        self,
        problem: Problem,
        tiles: Sequence[PlacedTile],
        relay: Sequence[tuple[int, Transfer]] | None,
        gateways: bool,
        direction: Direction,
    ) -> None:
        self.problem, self.relay, self.forward = problem, relay, direction == "forward"
        self.tiles = tiles
        self.node = problem.node_size if gateways else 1
        self.transfers: dict[int, list[Transfer]] = defaultdict(list)
        # (rank, what) -> last step at which a received operand is used or passed on
        self.last_use: dict[tuple[int, Key], int] = {}

    def build(self) -> Plan:
        operands: dict[tuple[Payload, Span, int], list[_Need]] = defaultdict(list)
        results: dict[tuple[Payload, Span, int], list[_Need]] = defaultdict(list)
        q_operand, q_result = (
            (Payload.Q, Payload.OUT) if self.forward else (Payload.Q_GRAD, Payload.DQ)
        )
        for step, rank, tile in self.tiles:
            kv_heads = self.problem.kv_range(tile.heads)
            for owner, part in self.problem.layout.split(tile.q):
                if owner != rank:
                    need = _Need(part, owner, step)
                    operands[q_operand, tile.heads, rank].append(need)
                    results[q_result, tile.heads, rank].append(need)
            for owner, part in self.problem.layout.split(tile.kv):
                if owner != rank:
                    need = _Need(part, owner, step)
                    operands[Payload.KV, kv_heads, rank].append(need)
                    if not self.forward:
                        results[Payload.DKV, kv_heads, rank].append(need)
        self._relay(operands)
        for (payload, heads), ranks in _by_kind(operands).items():
            if payload is not Payload.KV or self.relay is None:
                for members in self._groups(payload, ranks):
                    self._fetch(payload, heads, members)
        for (payload, heads), ranks in _by_kind(results).items():
            for members in self._groups(payload, ranks):
                self._return(payload, heads, members)
        return self._plan()

    def _groups(
        self, payload: Payload, ranks: dict[int, list[_Need]]
    ) -> Iterable[dict[int, list[_Need]]]:
        """Ranks whose needs are served together: those of a node, for keys and values."""
        if self.node == 1 or payload not in (Payload.KV, Payload.DKV):
            return [{rank: needs} for rank, needs in ranks.items()]
        nodes: dict[int, dict[int, list[_Need]]] = defaultdict(dict)
        for rank, needs in ranks.items():
            nodes[rank // self.node][rank] = needs
        return nodes.values()

    def _gateway(self, ranks: Sequence[int], owner: int) -> int | None:
        """The rank over which `owner` deals with `ranks`, all of one node; None for directly."""
        node = ranks[0] // self.node
        if len(ranks) < 2 or owner // self.node == node:
            return None
        return node * self.node + owner % self.node

    def _fetch(self, payload: Payload, heads: Span, members: dict[int, list[_Need]]) -> None:
        for span, owner, uses in _segments(members, of_first=True):
            gateway = self._gateway([rank for rank, _, _ in uses], owner)
            key = payload, span, heads
            for rank, first, last in uses:
                source = owner if gateway is None or rank == gateway else gateway
                if rank != gateway:
                    self._move(key, source, rank, first - 1)
                    self._keep(rank, key, last)
            if gateway is not None:
                arrive = min(first if rank == gateway else first - 1 for rank, first, _ in uses)
                self._move(key, owner, gateway, arrive - 1)
                for rank, first, last in uses:
                    self._keep(gateway, key, last if rank == gateway else first - 1)

    def _return(self, payload: Payload, heads: Span, members: dict[int, list[_Need]]) -> None:
        for span, owner, uses in _segments(members, of_first=False):
            gateway = self._gateway([rank for rank, _, _ in uses], owner)
            key, summed = (payload, span, heads), 0
            for rank, _, last in uses:
                if gateway is None:
                    self._move(key, rank, owner, last + 1)
                elif rank == gateway:
                    summed = max(summed, last)
                else:
                    self._move(key, rank, gateway, last + 1)
                    summed = max(summed, last + 1)
            if gateway is not None:
                self._move(key, gateway, owner, summed + 1)

    def _move(self, key: Key, src: int, dst: int, step: int) -> None:
        payload, span, heads = key
        self.transfers[step].append(Transfer(payload, span, src, dst, heads))

    def _keep(self, rank: int, key: Key, step: int) -> None:
        self.last_use[rank, key] = max(self.last_use.get((rank, key), step), step)

    def _relay(self, operands: dict[tuple[Payload, Span, int], list[_Need]]) -> None:
        if self.relay is None:
            return
        brought: dict[tuple[int, Span], list[Span]] = defaultdict(list)
        for step, transfer in self.relay:
            self.transfers[step].append(transfer)
            brought[transfer.dst, transfer.heads].append(transfer.span)
            self._keep(transfer.dst, transfer.key, step + 1)
            if not self.problem.layout.owns(transfer.src, transfer.span):
                self._keep(transfer.src, transfer.key, step)
        for (payload, heads, rank), needs in operands.items():
            for need in needs if payload is Payload.KV else ():
                spans = [s for s in brought[rank, heads] if s.meet(need.span) == need.span]
                if not spans:
                    raise ScheduleError(f"the relay brings no {need.span} to rank {rank}")
                self._keep(rank, (payload, spans[0], heads), need.step)

    def _plan(self) -> Plan:
        # what is needed at step 0 is fetched in steps of its own before it
        shift = max(0, -min(self.transfers, default=0))
        count = (
            1
            + shift
            + max(
                max((step for step, _, _ in self.tiles), default=0), max(self.transfers, default=0)
            )
        )
        tiles: dict[tuple[int, int], list[Tile]] = defaultdict(list)
        sends: dict[tuple[int, int], list[Transfer]] = defaultdict(list)
        receives: dict[tuple[int, int], list[Transfer]] = defaultdict(list)
        frees: dict[tuple[int, int], list[Key]] = defaultdict(list)
        for step, rank, tile in self.tiles:
            tiles[rank, step + shift].append(tile)
        for step, transfers in self.transfers.items():
            for transfer in sorted(transfers, key=lambda t: t.order):
                sends[transfer.src, step + shift].append(transfer)
                receives[transfer.dst, step + shift].append(transfer)
        for (rank, key), last in self.last_use.items():
            frees[rank, min(last + shift, count - 1)].append(key)
        return tuple(
            tuple(
                Step(
                    tuple(tiles.get((rank, step), ())),
                    tuple(sends.get((rank, step), ())),
                    tuple(receives.get((rank, step), ())),
                    tuple(frees.get((rank, step), ())),
                )
                for step in range(count)
            )
            for rank in range(self.problem.size)
        )


def _by_kind(
    needs: dict[tuple[Payload, Span, int], list[_Need]],
) -> dict[tuple[Payload, Span], dict[int, list[_Need]]]:
    kinds: dict[tuple[Payload, Span], dict[int, list[_Need]]] = defaultdict(dict)
    for (payload, heads, rank), of_rank in needs.items():
        kinds[payload, heads][rank] = of_rank
    return kinds


_Use = tuple[int, int, int]  # rank, first step, last step


def _segments(
    members: dict[int, list[_Need]], *, of_first: bool
) -> list[tuple[Span, int, list[_Use]]]:
    """Cut the needs of some ranks into disjoint token ranges that are each handled as one.

    Neighbouring ranges of one owner stay together when the same ranks need them first at the same
    steps (`of_first`; else: last at the same steps).
    """
    edges = sorted({edge for needs in members.values() for need in needs for edge in need.span})
    number = {edge: at for at, edge in enumerate(edges)}
    owners: dict[int, int] = {}
    uses: dict[int, dict[int, tuple[int, int]]] = defaultdict(dict)
    for rank, needs in members.items():
        for (start, stop), owner, step in needs:
            for at in range(number[start], number[stop]):
                owners[at] = owner
                first, last = uses[at].get(rank, (step, step))
                uses[at][rank] = min(first, step), max(last, step)
    found: list[tuple[Span, int, list[_Use]]] = []
    for at, (start, stop) in enumerate(pairwise(edges)):
        if at not in owners:
            continue
        of_ranks = [(rank, *steps) for rank, steps in sorted(uses[at].items())]
        if found:
            span, owner, before = found[-1]
            pick = 1 if of_first else 2
            if (
                span.stop == start
                and owner == owners[at]
                and [(u[0], u[pick]) for u in before] == [(u[0], u[pick]) for u in of_ranks]
            ):
                merged = [
                    (a[0], min(a[1], b[1]), max(a[2], b[2]))
                    for a, b in zip(before, of_ranks, strict=True)
                ]
                found[-1] = Span(span.start, stop), owner, merged
                continue
        found.append((Span(start, stop), owners[at], of_ranks))
    return found
