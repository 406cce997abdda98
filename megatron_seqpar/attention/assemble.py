# SPDX-License-Identifier: Apache-2.0
"""From placed tiles to a schedule: derive every transfer of the forward or the backward pass.

A builder only says which rank computes which tile at which step. What must move follows:

* an operand that the computing rank does not own is fetched one step before its first use, straight
  from its owner (unless the builder relays keys and values itself), and freed after its last use;
* a result that belongs to another rank is summed up where it is computed and returned once, one
step
  after its last tile: (out, LSE) in the forward pass, dq and (dk, dv) in the backward pass.

The backward plan therefore needs no rules of its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from ..errors import ScheduleError
from .ir import RETURNS, Direction, Payload, Placed, Plan, Problem, Step, Tile, Transfer
from .layouts import Span
from .masks import TileKind


def assemble(
    problem: Problem,
    placed: Iterable[Placed],
    *,
    relay: Iterable[tuple[int, Transfer]] | None = None,
    direction: Direction = "forward",
) -> Plan:
    """Build the plan of one pass from placed tiles.

    Args:
        problem: sizes, token layout and mask.
        placed: tiles by step and rank; empty ones (no interacting pair) are dropped.
        relay: KV transfers `(step, transfer)` that replace the direct ones, for builders in which
            ranks pass on what they received.
        direction: which pass.

    Raises:
        ScheduleError: a tile that no kernel can serve in one call, or one that spans two owners.
    """
    kept = [p for p in placed if problem.mask.pairs(p.q, p.kv) > 0]
    return _Assembly(problem, kept, None if relay is None else list(relay), direction).build()


class _Assembly:
    """Working state of one `assemble` call."""

    def __init__(
        self,
        problem: Problem,
        placed: list[Placed],
        relay: list[tuple[int, Transfer]] | None,
        direction: Direction,
    ) -> None:
        self.problem, self.direction = problem, direction
        self.placed, self.relay = placed, relay
        self.tiles: dict[tuple[int, int], list[Tile]] = defaultdict(list)
        self.transfers: dict[int, list[Transfer]] = defaultdict(list)
        # (rank, payload, span) of a received operand -> first and last step that needs it
        self.uses: dict[tuple[int, Payload, Span], tuple[int, int]] = {}
        self.sources: dict[tuple[int, Payload, Span], int] = {}
        # (rank, payload, span, owner) of a result that goes back -> step of its last tile
        self.results: dict[tuple[int, Payload, Span, int], int] = {}

    def build(self) -> Plan:
        forward = self.direction == "forward"
        q_payload = Payload.Q if forward else Payload.Q_GRAD
        # an operand needed at step 0 is fetched in a step of its own before it
        shift = int(any(p.step == 0 and not self._is_local(p) for p in self.placed))
        for p in self.placed:
            step, tile = p.step + shift, self._tile(p)
            self.tiles[p.rank, step].append(tile)
            if tile.q_owner != p.rank:
                self._fetch(p.rank, q_payload, tile.q, tile.q_owner, step)
                self._return(
                    p.rank, Payload.OUT if forward else Payload.DQ, tile.q, tile.q_owner, step
                )
            if tile.kv_owner != p.rank:
                self._fetch(p.rank, Payload.KV, tile.kv, tile.kv_owner, step)
                if not forward:
                    self._return(p.rank, Payload.DKV, tile.kv, tile.kv_owner, step)
        self._post_transfers(shift)
        return self._plan()

    def _is_local(self, p: Placed) -> bool:
        layout = self.problem.layout
        return layout.owner(p.q) == p.rank == layout.owner(p.kv)

    def _tile(self, p: Placed) -> Tile:
        mask, layout = self.problem.mask, self.problem.layout
        kind = mask.kind(p.q, p.kv)
        if kind is TileKind.PARTIAL:
            raise ScheduleError(
                f"tile q {p.q} x kv {p.kv} is neither full nor a diagonal "
                f"square under mask {mask.name!r}; the builder must split it"
            )
        pairs = mask.pairs(p.q, p.kv)
        return Tile(p.q, p.kv, layout.owner(p.q), layout.owner(p.kv), kind, pairs)

    def _fetch(self, rank: int, payload: Payload, span: Span, owner: int, step: int) -> None:
        key = rank, payload, span
        first, last = self.uses.get(key, (step, step))
        self.uses[key] = min(first, step), max(last, step)
        self.sources[key] = owner

    def _return(self, rank: int, payload: Payload, span: Span, owner: int, step: int) -> None:
        key = rank, payload, span, owner
        self.results[key] = max(self.results.get(key, step), step)

    def _post_transfers(self, shift: int) -> None:
        for (rank, payload, span), (first, _) in self.uses.items():
            if payload is Payload.KV and self.relay is not None:
                continue
            source = self.sources[rank, payload, span]
            self.transfers[first - 1].append(Transfer(payload, span, source, rank))
        for (rank, payload, span, owner), last in self.results.items():
            self.transfers[last + 1].append(Transfer(payload, span, rank, owner))
        for step, transfer in self.relay or ():
            step += shift
            self.transfers[step].append(transfer)
            self._relay_lifetime(transfer.dst, transfer, step + 1)
            if self.problem.layout.owner(transfer.span) != transfer.src:
                self._relay_lifetime(transfer.src, transfer, step)

    def _relay_lifetime(self, rank: int, transfer: Transfer, step: int) -> None:
        key = rank, transfer.payload, transfer.span
        first, last = self.uses.get(key, (step, step))
        self.uses[key] = min(first, step), max(last, step)

    def _plan(self) -> Plan:
        size = self.problem.layout.size
        count = 1 + max(
            max((step for _, step in self.tiles), default=0), max(self.transfers, default=0)
        )
        sends: dict[tuple[int, int], list[Transfer]] = defaultdict(list)
        receives: dict[tuple[int, int], list[Transfer]] = defaultdict(list)
        frees: dict[tuple[int, int], list[tuple[Payload, Span]]] = defaultdict(list)
        for step, transfers in self.transfers.items():
            for transfer in sorted(transfers, key=lambda t: t.order):
                sends[transfer.src, step].append(transfer)
                receives[transfer.dst, step].append(transfer)
        for (rank, payload, span), (_, last) in self.uses.items():
            if payload not in RETURNS:
                frees[rank, min(last, count - 1)].append((payload, span))
        return tuple(
            tuple(
                Step(
                    tuple(self.tiles[rank, step]),
                    tuple(sends[rank, step]),
                    tuple(receives[rank, step]),
                    tuple(frees[rank, step]),
                )
                for step in range(count)
            )
            for rank in range(size)
        )
