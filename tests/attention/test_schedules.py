# SPDX-License-Identifier: Apache-2.0
"""Builders against what they promise: proof, balance and volume, at every size to 64."""

import random
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_seqpar.attention import (
    Causal,
    Full,
    Mask,
    Payload,
    Route,
    build_schedule,
    even_lengths,
)
from megatron_seqpar.attention.masks import MASKS
from megatron_seqpar.attention.schedules import names
from megatron_seqpar.errors import ScheduleError

SIZES = range(1, 65)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("name", names())
def test_every_size_is_proved_in_both_directions(name: str, mask: Mask) -> None:
    for size in (*range(1, 18), 24, 33, 64):
        plan = build_schedule(
            name, size=size, seq_length=size * 6 + size // 2, mask=mask, query_heads=8, kv_heads=2
        )
        assert plan.verify()
        assert plan.backward().verify()


def test_balanced_is_never_idle_with_equal_chunks() -> None:
    for size in SIZES:
        plan = build_schedule("balanced", size=size, seq_length=size * 128)
        assert plan.idle_fraction == 0
        assert {plan.work(rank) for rank in range(size)} == {plan.total_work // size}


def test_balanced_work_is_exactly_half_the_axis_in_chunk_units() -> None:
    for size in SIZES:
        chunk = 64
        plan = build_schedule("balanced", size=size, seq_length=size * chunk)
        for rank in range(size):
            off_diagonal = sum(
                tile.pairs for step in plan.steps(rank) for tile in step.tiles if tile.q != tile.kv
            )
            assert Fraction(off_diagonal, chunk * chunk) == Fraction(size - 1, 2)


@pytest.mark.parametrize("chunk", [5, 16, 127])
def test_balanced_stays_near_the_mean_when_lengths_do_not_divide(chunk: int) -> None:
    for size in SIZES:
        for more in {0, 1, size // 2, size - 1}:
            plan = build_schedule("balanced", size=size, seq_length=size * chunk + more)
            mean = plan.total_work / size
            assert max(plan.work(r) for r in range(size)) <= mean * (1 + 2 / chunk)
            assert plan.idle_fraction <= 2 / chunk


def test_ring_loses_what_the_causal_triangle_costs() -> None:
    for size in SIZES:
        plan = build_schedule("ring", size=size, seq_length=size * 4096)
        assert plan.idle_fraction == pytest.approx((size - 1) / (2 * size - 1), abs=1e-3)


def test_full_masks_are_balanced_either_way() -> None:
    for size in SIZES:
        for name in ("balanced", "ring"):
            plan = build_schedule(name, size=size, seq_length=size * 8, mask=Full())
            assert plan.idle_fraction == 0


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 2), (8, 1)])
def test_forward_volume_is_the_sum_of_the_routes(heads: int, kv_heads: int) -> None:
    """Counted tile by tile: KV-routes 2 Hkv, Q-routes 2 Hq and LSE."""
    chunk, dim, item = 32, 16, 2
    for size in SIZES:
        plan = build_schedule(
            "balanced", size=size, seq_length=size * chunk, query_heads=heads, kv_heads=kv_heads,
            head_dim=dim,
        )  # fmt: skip
        expected = 0
        for rank in range(size):
            for step in plan.steps(rank):
                for tile in step.tiles:
                    if tile.route(rank) is Route.KV:
                        expected += tile.kv.size * 2 * kv_heads * dim * item
                    elif tile.route(rank) is Route.Q:
                        expected += tile.q.size * heads * (2 * dim * item + 4)
        assert sum(plan.bytes_sent(r, "forward", "bfloat16") for r in range(size)) == expected


def test_ring_volume_is_every_chunk_past_every_rank() -> None:
    plan = build_schedule("ring", size=5, seq_length=500, query_heads=4, kv_heads=2, head_dim=8)
    for rank in range(5):
        assert plan.bytes_sent(rank, "forward", "float32") == 4 * 100 * 2 * (8 + 8) * 4
        assert plan.messages_sent(rank, "forward") == 8


def test_backward_q_routes_send_delta_and_not_the_output() -> None:
    plan = build_schedule("balanced", size=2, seq_length=64, query_heads=4, kv_heads=4, head_dim=16)
    # rank 1 sends half its queries: q, dout, and two fp32 numbers a row and head; and gets dq back;
    # it returns the dk and dv of rank 0's whole chunk
    queries = 16 * 4 * (2 * 16 * 2 + 2 * 4)
    assert plan.bytes_sent(1, "backward", "bfloat16") == queries + 32 * 4 * 2 * 16 * 2
    assert plan.bytes_sent(0, "backward", "bfloat16") == 32 * 4 * 2 * 16 * 2 + 16 * 4 * 16 * 2


def test_received_operands_are_bounded_by_two_steps() -> None:
    for size in (2, 3, 8, 64):
        plan = build_schedule("balanced", size=size, seq_length=size * 16, head_dim=8)
        most = max(plan.problem.payload_bytes(payload, 16, 2) for payload in Payload)
        for rank in range(size):
            assert plan.peak_received_bytes(rank) <= 3 * most


def test_auto_takes_the_schedule_with_least_idle_time() -> None:
    assert build_schedule("auto", size=4, seq_length=64).name == "balanced"
    assert build_schedule("auto", size=4, seq_length=64, mask=Full()).idle_fraction == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "zigzagg"}, r"schedule='zigzagg' is unknown; use one of auto, balanced, ring"),
        ({"seq_length": 3}, r"seq_length=3 is shorter than size=4"),
        ({"query_heads": 6, "kv_heads": 4}, r"query_heads=6 is not a multiple of kv_heads=4"),
        ({"size": 0}, r"at least one rank"),
        ({"head_dim": 0}, r"must be >= 1"),
    ],
)
def test_what_cannot_be_built_is_refused(change: dict, message: str) -> None:
    options = {"name": "balanced", "size": 4, "seq_length": 64} | change
    with pytest.raises(ScheduleError, match=message):
        build_schedule(options.pop("name"), **options)


def test_unknown_dtype_and_direction_are_refused() -> None:
    plan = build_schedule("balanced", size=2, seq_length=8)
    with pytest.raises(ScheduleError, match="dtype=int7"):
        plan.bytes_sent(0, dtype="int7")
    with pytest.raises(ScheduleError, match="use 'forward' or 'backward'"):
        plan.bytes_sent(0, "sideways")


def _random_problem(pick: random.Random) -> dict:
    # small sizes are as telling and far cheaper, so most draws are small
    size = pick.randint(1, 64) if pick.random() < 0.05 else pick.randint(1, 10)
    if pick.random() < 0.5:
        lengths = even_lengths(pick.randint(size, size * 40), size)
    else:
        lengths = tuple(pick.randint(1, 30) for _ in range(size))
    kv_heads = pick.randint(1, 8)
    return {
        "name": pick.choice(["balanced", "ring"]),
        "size": size,
        "lengths": lengths,
        "mask": pick.choice([Causal(), Full()]),
        "kv_heads": kv_heads,
        "query_heads": kv_heads * pick.randint(1, 8),
        "head_dim": pick.choice([8, 64, 128]),
    }


def _prove(problem: dict) -> None:
    plan = build_schedule(**problem)
    assert plan.verify()
    assert plan.backward().verify()
    mask, chunks = plan.problem.mask, plan.problem.layout.chunks
    assert plan.total_work == sum(mask.pairs(q, kv) for q in chunks for kv in chunks)


def test_ten_thousand_random_schedules_are_proved() -> None:
    pick = random.Random(2310_03294)
    for _ in range(10_000):
        problem = _random_problem(pick)
        try:
            _prove(problem)
        except Exception as failure:
            raise AssertionError(f"{problem}") from failure


@settings(max_examples=200, deadline=None)
@given(st.randoms(use_true_random=False))
def test_random_schedules_with_shrinking(pick: random.Random) -> None:
    """The same property where a failure is shrunk to its smallest case."""
    _prove(_random_problem(pick))
