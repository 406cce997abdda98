# SPDX-License-Identifier: Apache-2.0
"""The schedule: who computes which tile when and what moves, in one pass; its proof, its numbers.

Its parts are in `ir.py`, which begins with how a step runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from ..errors import ScheduleError
from .assemble import assemble
from .ir import PARTS, RETURNS, Direction, Placed, Plan, Problem, Step, Transfer, item_size
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
        placed: the tiles as the builder placed them (what `backward` is derived from).
        relay: KV transfers given by the builder instead of direct sends, `(step, transfer)`.
    """

    name: str
    direction: Direction
    problem: Problem
    plan: Plan
    placed: tuple[Placed, ...]
    relay: tuple[tuple[int, Transfer], ...] | None = None

    @classmethod
    def of(
        cls,
        name: str,
        problem: Problem,
        placed: Iterable[Placed],
        relay: Iterable[tuple[int, Transfer]] | None = None,
    ) -> Schedule:
        """The forward schedule of placed tiles; `ScheduleError` for a tile no kernel can serve."""
        placed, relay = tuple(placed), None if relay is None else tuple(relay)
        plan = assemble(problem, placed, relay=relay, direction="forward")
        return cls(name, "forward", problem, plan, placed, relay)

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
        """Interacting pairs that `rank` computes, per query head."""
        return sum(tile.pairs for step in self.plan[rank] for tile in step.tiles)

    @property
    def total_work(self) -> int:
        """Interacting pairs of all ranks, per query head."""
        return sum(self.work(rank) for rank in range(self.size))

    @property
    def critical_work(self) -> int:
        """Pairs on the critical path when ranks go step by step: the sum of each step's maximum."""
        return sum(
            max(sum(tile.pairs for tile in step.tiles) for step in together)
            for together in zip(*self.plan, strict=True)
        )

    @property
    def idle_fraction(self) -> float:
        """Share of rank-time spent idle when all ranks go step by step together, transfers free.

        The strict measure: a rank that is early in one step is not credited for it in the next.
        """
        critical = self.size * self.critical_work
        return (critical - self.total_work) / critical

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
        return batch * sum(
            plan.problem.payload_bytes(t.payload, t.span.size, item) for t in plan.transfers(rank)
        )

    def messages_sent(self, rank: int, direction: Direction | None = None) -> int:
        """Point-to-point messages that `rank` sends in one pass: one a tensor of a payload."""
        return sum(PARTS[t.payload] for t in self._pass(direction).transfers(rank))

    def peak_received_bytes(self, rank: int, dtype: object = "bfloat16", *, batch: int = 1) -> int:
        """Most bytes of received payloads that `rank` holds at once in this pass."""
        item, held, peak = item_size(dtype), 0, 0
        for step in self.plan[rank]:
            arriving = {
                (t.payload, t.span, t.src): self.problem.payload_bytes(t.payload, t.span.size, item)
                for t in step.receives
            }
            held += sum(arriving.values())
            peak = max(peak, held)
            # partial results are merged as they arrive; operands stay until their last use
            held -= sum(size for (p, _, _), size in arriving.items() if p in RETURNS)
            held -= sum(self.problem.payload_bytes(p, s.size, item) for p, s in step.frees)
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
        plan = assemble(self.problem, self.placed, relay=self.relay, direction=direction)
        return replace(self, direction=direction, plan=plan)

    def replace_step(self, rank: int, index: int, **changes: object) -> Schedule:
        """A copy with one step changed (for tools and tests that probe `verify`)."""
        steps = list(self.plan[rank])
        steps[index] = replace(steps[index], **changes)  # type: ignore[arg-type]
        plan = (*self.plan[:rank], tuple(steps), *self.plan[rank + 1 :])
        return replace(self, plan=plan)
