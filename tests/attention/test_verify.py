# SPDX-License-Identifier: Apache-2.0
"""Mutations of right plans: `verify` must catch every one, and say what it caught."""

from dataclasses import replace

import pytest

from megatron_seqpar.attention import Payload, Schedule, Span, Tile, build_schedule
from megatron_seqpar.errors import ScheduleError

PLANS = [
    pytest.param(name, size, backward, id=f"{name}-{size}-{'backward' if backward else 'forward'}")
    for name in ("balanced", "ring")
    for size in (2, 3, 4, 7, 8)
    for backward in (False, True)
]


def _plan(name: str, size: int, backward: bool) -> Schedule:
    plan = build_schedule(name, size=size, seq_length=size * 6, query_heads=4, kv_heads=2)
    plan = plan.backward() if backward else plan
    assert plan.verify()
    return plan


def _first(plan: Schedule, what: str) -> tuple[int, int]:
    """(rank, step) of the first step whose `what` is not empty."""
    return next(
        (rank, index)
        for rank, steps in enumerate(plan.plan)
        for index, step in enumerate(steps)
        if getattr(step, what)
    )


@pytest.mark.parametrize(("name", "size", "backward"), PLANS)
def test_every_dropped_tile_is_caught(name: str, size: int, backward: bool) -> None:
    plan = _plan(name, size, backward)
    for rank, steps in enumerate(plan.plan):
        for index, step in enumerate(steps):
            for t in range(len(step.tiles)):
                broken = plan.replace_step(rank, index, tiles=step.tiles[:t] + step.tiles[t + 1 :])
                with pytest.raises(ScheduleError, match="are computed 0 times"):
                    broken.verify()


@pytest.mark.parametrize(("name", "size", "backward"), PLANS)
def test_every_doubled_tile_is_caught(name: str, size: int, backward: bool) -> None:
    plan = _plan(name, size, backward)
    for rank, steps in enumerate(plan.plan):
        for index, step in enumerate(steps):
            for tile in step.tiles:
                broken = plan.replace_step(rank, index, tiles=(*step.tiles, tile))
                with pytest.raises(ScheduleError, match="are computed 2 times"):
                    broken.verify()


@pytest.mark.parametrize("side", ["sends", "receives"])
@pytest.mark.parametrize(("name", "size", "backward"), PLANS)
def test_every_unmatched_transfer_is_caught(
    name: str, size: int, backward: bool, side: str
) -> None:
    plan = _plan(name, size, backward)
    word = "receive has no send" if side == "sends" else "send has no receive"
    for rank, steps in enumerate(plan.plan):
        for index, step in enumerate(steps):
            kept = getattr(step, side)
            for t in range(len(kept)):
                broken = plan.replace_step(rank, index, **{side: kept[:t] + kept[t + 1 :]})
                with pytest.raises(ScheduleError, match=word):
                    broken.verify()


def test_a_deadlock_is_caught() -> None:
    """Two ranks that each wait for the other's send before posting their own."""
    plan = build_schedule("ring", size=2, seq_length=12)
    for rank in range(2):
        sends = plan.steps(rank)[0].sends
        plan = plan.replace_step(rank, 0, sends=()).replace_step(rank, 1, sends=sends)
    with pytest.raises(ScheduleError, match=r"deadlock: rank 0 at step 0, rank 1 at step 0"):
        plan.verify()


def test_a_cycle_of_three_is_caught() -> None:
    plan = build_schedule("ring", size=3, seq_length=12)
    for rank in range(3):
        moved = plan.steps(rank)[0].sends
        later = plan.steps(rank)[1].sends
        plan = plan.replace_step(rank, 0, sends=()).replace_step(rank, 1, sends=moved + later)
    with pytest.raises(ScheduleError, match="deadlock"):
        plan.verify()


def test_transfers_in_different_orders_are_caught() -> None:
    plan = build_schedule("ring", size=3, seq_length=12)
    first, second = (plan.steps(0)[index].sends for index in (0, 1))
    swapped = plan.replace_step(0, 0, sends=second).replace_step(0, 1, sends=first)
    with pytest.raises(ScheduleError, match="different orders"):
        swapped.verify()


@pytest.mark.parametrize(("name", "size", "backward"), PLANS)
def test_a_tile_before_its_operand_is_caught(name: str, size: int, backward: bool) -> None:
    plan = _plan(name, size, backward)
    rank, index = next(
        (rank, i)
        for rank, steps in enumerate(plan.plan)
        for i, step in enumerate(steps)
        if any(not plan.problem.layout.owns(rank, t.kv) for t in step.tiles)
    )
    early = plan.steps(rank)[index].tiles
    at_start = plan.steps(rank)[0].tiles
    broken = plan.replace_step(rank, index, tiles=()).replace_step(rank, 0, tiles=at_start + early)
    with pytest.raises(ScheduleError, match="before it arrived"):
        broken.verify()


def test_memory_mistakes_are_caught() -> None:
    plan = build_schedule("balanced", size=4, seq_length=24)
    rank, index = _first(plan, "frees")
    with pytest.raises(ScheduleError, match="never frees"):
        plan.replace_step(rank, index, frees=()).verify()
    key = plan.steps(rank)[index].frees[0]
    with pytest.raises(ScheduleError, match="which it does not hold"):
        plan.replace_step(rank, index, frees=(key, key)).verify()


def test_a_result_that_is_never_returned_is_caught() -> None:
    plan = build_schedule("balanced", size=3, seq_length=24)
    transfer, src_step, dst_step = next(
        (t, i, j)
        for i, step in enumerate(plan.steps(0))
        for t in step.sends
        if t.payload is Payload.OUT
        for j, other in enumerate(plan.steps(t.dst))
        if t in other.receives
    )
    sends = tuple(t for t in plan.steps(0)[src_step].sends if t != transfer)
    receives = tuple(t for t in plan.steps(transfer.dst)[dst_step].receives if t != transfer)
    broken = plan.replace_step(0, src_step, sends=sends)
    broken = broken.replace_step(transfer.dst, dst_step, receives=receives)
    with pytest.raises(ScheduleError, match="is never returned"):
        broken.verify()


def test_a_result_sent_before_its_tile_is_caught() -> None:
    plan = build_schedule("balanced", size=3, seq_length=24)
    index = next(
        i for i, s in enumerate(plan.steps(0)) if s.sends and s.sends[-1].payload is Payload.OUT
    )
    transfer = plan.steps(0)[index].sends[-1]
    for rank, side in ((0, "sends"), (transfer.dst, "receives")):
        late, early = plan.steps(rank)[index], plan.steps(rank)[index - 1]
        plan = plan.replace_step(
            rank, index, **{side: tuple(t for t in getattr(late, side) if t != transfer)}
        ).replace_step(rank, index - 1, **{side: (*getattr(early, side), transfer)})
    with pytest.raises(ScheduleError, match=r"returns what is not|was returned before"):
        plan.verify()


def test_false_claims_about_a_tile_are_caught() -> None:
    plan = build_schedule("balanced", size=2, seq_length=8)
    tile: Tile = plan.steps(0)[0].tiles[0]
    for lie in (
        replace(tile, high=None),
        replace(tile, pairs=tile.pairs + 1),
        replace(tile, kv=Span(4, 8)),
    ):
        with pytest.raises(ScheduleError, match="tile"):
            plan.replace_step(0, 0, tiles=(lie,)).verify()


def test_a_send_of_what_the_rank_has_not_is_caught() -> None:
    plan = build_schedule("balanced", size=3, seq_length=12)
    step = plan.steps(0)[0]
    kv = next(t for t in step.sends if t.payload is Payload.KV)
    stranger = replace(kv, span=Span(8, 12))
    receiver = plan.steps(kv.dst)[0]
    broken = plan.replace_step(0, 0, sends=tuple(stranger if t == kv else t for t in step.sends))
    broken = broken.replace_step(
        kv.dst, 0, receives=tuple(stranger if t == kv else t for t in receiver.receives)
    )
    with pytest.raises(ScheduleError, match=r"does not have|before it arrived"):
        broken.verify()
