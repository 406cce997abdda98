# SPDX-License-Identifier: Apache-2.0
"""The schedule: who computes which tile when and what moves, in one pass; its proof, its numbers.

Its parts are in `ir.py`, which begins with how a step runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from ..errors import ScheduleError
from .assemble import PlacedTile, assemble, cut_tiles
from .ir import PARTS, RETURNS, Direction, Plan, Problem, Step, Transfer, item_size
from .placement import Placement
from .verify import verify


@dataclass(frozen=True)
class Schedule:
    """A complete plan for one attention call over the SP axis, forward or backward.

    Build one with `build_schedule`; `backward()` derives the backward plan from the same placed
    tiles.

    Attributes:
        name: the builder's name.
        direction: which pass this plan is for.
        problem: what it computes.
        plan: `plan[rank]` is that rank's steps; every rank has the same number of steps.
        tiles: the tiles by step and rank, as the builder placed them (what `backward` is derived
            from).
        placement: the builder's answer, with what it says of routes.
    """

    name: str
    direction: Direction
    problem: Problem
    plan: Plan
    tiles: tuple[PlacedTile, ...]
    placement: Placement

    @classmethod
    def of(cls, name: str, problem: Problem, placement: Placement) -> Schedule:
        """The forward schedule of a placement; `ScheduleError` for one that cannot be."""
        tiles = cut_tiles(problem, placement.tiles)
        plan = _plan(problem, tiles, placement, "forward")
        return cls(name, "forward", problem, plan, tiles, placement)

    @property
    def size(self) -> int:
        """Ranks of the SP axis."""
        return self.problem.layout.size

    def steps(self, rank: int) -> tuple[Step, ...]:
        """The steps of one rank (a group rank)."""
        return self.plan[rank]

    def backward(self) -> Schedule:
        """The backward plan: same tiles and steps; operands move again and gradients move back."""
        return self._backward

    @cached_property
    def _backward(self) -> Schedule:
        return self._derive("backward")

    def verify(self) -> bool:
        """Prove the plan right (see `verify.py`): True, or `ScheduleError` that says why not."""
        return verify(self.problem, self.direction, self.plan)

    # ---- accounting ---------------------------------------------------------------------------

    def work(self, rank: int) -> int:
        """Interacting pairs times query heads that `rank` computes."""
        return sum(tile.work for step in self.plan[rank] for tile in step.tiles)

    @property
    def total_work(self) -> int:
        """Interacting pairs times query heads of all ranks."""
        return sum(self.work(rank) for rank in range(self.size))

    @property
    def critical_work(self) -> int:
        """Work on the critical path when ranks go step by step: the sum of each step's maximum."""
        return sum(
            max(sum(tile.work for tile in step.tiles) for step in together)
            for together in zip(*self.plan, strict=True)
        )

    @property
    def idle_fraction(self) -> float:
        """Share of rank-time spent idle when all ranks go step by step together, transfers free.

        The strict measure: a rank that is early in one step is not credited for it in the next.
        """
        critical = self.size * self.critical_work
        return (critical - self.total_work) / critical if critical else 0.0

    def transfers(self, rank: int) -> Iterator[Transfer]:
        """Every transfer that `rank` sends, in order."""
        for step in self.plan[rank]:
            yield from step.sends

    def bytes_sent(
        self,
        rank: int,
        direction: Direction | None = None,
        dtype: object = "bfloat16",
        *,
        batch: int = 1,
    ) -> int:
        """Bytes that `rank` sends in one pass.

        Args:
            rank: group rank.
            direction: "forward", "backward", or None for this plan's own.
            dtype: of q, k, v: a torch dtype, a name ("bfloat16"), or bytes per element.
            batch: samples in the batch.
        """
        plan, item = self._pass(direction), item_size(dtype)
        return batch * sum(plan.problem.transfer_bytes(t, item) for t in plan.transfers(rank))

    def messages_sent(self, rank: int, direction: Direction | None = None) -> int:
        """Point-to-point messages that `rank` sends in one pass: one a tensor of a payload."""
        return sum(PARTS[t.payload] for t in self._pass(direction).transfers(rank))

    def peak_received_bytes(self, rank: int, dtype: object = "bfloat16", *, batch: int = 1) -> int:
        """Most bytes of received payloads that `rank` holds at once in this pass."""
        problem, item, held, peak = self.problem, item_size(dtype), 0, 0

        def size(transfer: Transfer) -> int:
            return problem.transfer_bytes(transfer, item)

        for step in self.plan[rank]:
            # partial results are merged as they arrive; operands stay until their last use
            passing = sum(size(t) for t in step.receives if t.payload in RETURNS)
            held += sum(size(t) for t in step.receives if t.payload not in RETURNS)
            peak = max(peak, held + passing)
            held -= sum(
                problem.payload_bytes(payload, span.size, heads.size, item)
                for payload, span, heads in step.frees
            )
        return batch * peak

    def _pass(self, direction: Direction | None) -> Schedule:
        if direction is None or direction == self.direction:
            return self
        if direction == "backward":
            return self.backward()
        if direction != "forward":
            raise ScheduleError(f"direction={direction!r}: use 'forward' or 'backward'")
        return self._derive("forward")

    def _derive(self, direction: Direction) -> Schedule:
        plan = _plan(self.problem, self.tiles, self.placement, direction)
        return replace(self, direction=direction, plan=plan)

    def replace_step(self, rank: int, index: int, **changes: object) -> Schedule:
        """A copy with one step changed (for tools and tests that probe `verify`)."""
        steps = list(self.plan[rank])
        steps[index] = replace(steps[index], **changes)  # type: ignore[arg-type]
        plan = (*self.plan[:rank], tuple(steps), *self.plan[rank + 1 :])
        return replace(self, plan=plan)


def _plan(
    problem: Problem, tiles: tuple[PlacedTile, ...], placement: Placement, direction: Direction
) -> Plan:
    return assemble(
        problem,
        tiles,
        relay=placement.relay,
        gateways=placement.gateways,
        direction=direction,
    )
