# SPDX-License-Identifier: Apache-2.0
"""Seconds, FLOPs and bytes of a schedule's parts, by hand and against published tables."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_seqpar.attention import build_schedule
from megatron_seqpar.attention.ir import Payload, Problem, Tile, Transfer
from megatron_seqpar.attention.layouts import Span, TokenLayout
from megatron_seqpar.attention.masks import Causal
from megatron_seqpar.simulate import (
    Costs,
    attention_flops,
    load_cluster,
    tile_seconds,
    transfer_seconds,
)
from megatron_seqpar.simulate.cluster import Direction

from .plans import cluster, curve, tile


def problem(heads: int = 4, kv_heads: int = 2, dk: int = 192, dv: int = 128) -> Problem:
    return Problem(TokenLayout.contiguous(2, seq_length=64), Causal(), heads, kv_heads, dk, dv)


def test_flops_count_every_product() -> None:
    # forward: q k^T (192) and p v (128); backward: three of 192 and two of 128
    assert attention_flops(10, 4, 192, 128, "forward") == 2 * 10 * 4 * (192 + 128)
    assert attention_flops(10, 4, 192, 128, "backward") == 2 * 10 * 4 * (3 * 192 + 2 * 128)
    same = [attention_flops(10, 4, 64, 64, direction) for direction in ("forward", "backward")]
    assert same[1] == 2.5 * same[0]


def test_flops_of_a_causal_schedule_are_those_of_the_problem() -> None:
    plan = build_schedule("balanced", size=3, seq_length=33, query_heads=4, head_dim=16)
    costs = Costs(plan.problem, cluster(), batch=2)
    total = sum(costs.flops(t) for steps in plan.plan for step in steps for t in step.tiles)
    assert total == 2 * 4 * (33 * 34 // 2) * 4 * 16


def test_seconds_of_a_tile() -> None:
    on = cluster(kernel=curve(launch=0.5, share=0.8, half_rows=8, half_keys=3))
    # 4 queries x 2 heads are 8 rows: 1 + 8/8; 6 keys: + 3/6
    flops = 2 * 24 * 2 * (192 + 128)
    expected = 0.5 + flops / (4 * 0.8 / 2.5)
    got = tile_seconds(tile(24, 4, 2), problem(), "bfloat16", "forward", on)
    assert got == pytest.approx(expected)
    # three samples: three times the work on three times the rows
    got = tile_seconds(tile(24, 4, 2), problem(), "bfloat16", "forward", on, batch=3)
    assert got == pytest.approx(0.5 + 3 * flops / (4 * 0.8 / (1 + 8 / 24 + 3 / 6)))


def test_a_cut_tile_has_its_own_curve_and_its_mean_keys() -> None:
    on = cluster()
    band = curve(half_keys=2.5)
    on = replace(on, kernel=replace(on.kernel, forward_band=band))
    # 4 queries and 4 keys, causal: 10 pairs, 2.5 keys a query: half the speed
    cut = Tile(Span(0, 4), Span(0, 4), Span(0, 1), None, 0, 10)
    one = problem(1, 1, 1, 1)
    assert tile_seconds(cut, one, "bfloat16", "forward", on) == pytest.approx(20)
    assert tile_seconds(cut, one, "bfloat16", "backward", on) == pytest.approx(25)
    assert tile_seconds(tile(16, 4), one, "bfloat16", "forward", on) == pytest.approx(16)


def test_seconds_of_a_transfer() -> None:
    on = cluster(ranks_per_node=2, bandwidth=8.0, network=2.0, latency=0.5)
    assert transfer_seconds(16, 0, 1, on) == 2.5
    assert transfer_seconds(16, 1, 2, on) == 8.5
    assert transfer_seconds(16, 1, 1, on) == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("payload", list(Payload))
def test_bytes_are_the_problems(payload: Payload, dtype: str) -> None:
    transfer = Transfer(payload, Span(0, 10), 0, 1, Span(0, 2))
    item = {"bfloat16": 2, "float32": 4}[dtype]
    got = Costs(problem(), cluster(), dtype, batch=3).bytes(transfer)
    assert got == 3 * problem().transfer_bytes(transfer, item)


def test_merges_move_memory() -> None:
    on = cluster(memory=100.0, small_kernel=0.5)
    costs = Costs(problem(), on)
    # 10 tokens x 2 heads x 128: bf16 partial read, fp32 sum read and written; three fp32 LSEs
    out = Transfer(Payload.OUT, Span(0, 10), 1, 0, Span(0, 2))
    moved = 10 * 2 * (128 * (2 + 4 + 4) + 3 * 4)
    assert costs.merge_seconds(out) == pytest.approx(6 * 0.5 + moved / 100)
    dkv = Transfer(Payload.DKV, Span(0, 10), 1, 0, Span(0, 2))
    assert costs.merge_seconds(dkv) == pytest.approx(2 * 0.5 + 10 * 2 * 320 * 10 / 100)
    assert costs.merge_seconds(Transfer(Payload.KV, Span(0, 10), 1, 0, Span(0, 2))) == 0


def test_posting_a_result_rounds_its_sum() -> None:
    on = cluster(memory=100.0, small_kernel=0.5, overhead=0.25)
    dq = Transfer(Payload.DQ, Span(0, 10), 1, 0, Span(0, 2))
    rounding = 0.5 + 10 * 2 * 192 * (4 + 2) / 100
    assert Costs(problem(), on).post_seconds(dq) == pytest.approx(0.25 + rounding)
    assert Costs(problem(), on).receive_seconds(dq) == 0.25
    # sums of fp32 inputs are sent as they are
    assert Costs(problem(), on, "float32").post_seconds(dq) == 0.25
    q_grad = Transfer(Payload.Q_GRAD, Span(0, 10), 1, 0, Span(0, 2))
    assert Costs(problem(), on).post_seconds(q_grad) == 3 * 0.25


def test_a_tiles_result_is_added_to_what_is_there() -> None:
    on, some = cluster(memory=100.0), tile(50, 5, 4)
    queries = ("q", Span(0, 5), Span(0, 4))
    ((total, seconds),) = Costs(problem(), on).results(some)
    assert (total, seconds) == (queries, pytest.approx(5 * 4 * (128 * 10 + 12) / 100))
    dq, dkv = Costs(problem(), on, direction="backward").results(some)
    assert dq == (queries, pytest.approx(5 * 4 * 192 * 10 / 100))
    # dk and dv of the two heads that the four query heads share
    assert dkv == (("kv", Span(0, 10), Span(0, 2)), pytest.approx(10 * 2 * 320 * 10 / 100))


# TFLOP/s published for (samples, heads, tokens, head dim); the sources are in the cluster files
PUBLISHED = [
    ("dgx-h100", 32, 16, 512, 128, True, "forward", 430.3),
    ("dgx-h100", 16, 16, 1024, 128, True, "forward", 517.1),
    ("dgx-h100", 8, 16, 2048, 128, True, "forward", 565.5),
    ("dgx-h100", 4, 16, 4096, 128, True, "forward", 590.2),
    ("dgx-h100", 2, 16, 8192, 128, True, "forward", 614.2),
    ("dgx-h100", 1, 16, 16384, 128, True, "forward", 620.7),
    ("dgx-h100", 1, 8, 32768, 64, True, "forward", 514.1),
    ("dgx-b200", 4, 16, 8192, 128, True, "forward", 1534.8),
    ("dgx-b200", 4, 16, 8192, 128, False, "forward", 1418.1),
    ("dgx-b200", 4, 16, 8192, 128, True, "backward", 1359.8),
    ("dgx-b200", 4, 16, 8192, 128, False, "backward", 1208.6),
    ("dgx-a100", 1, 16, 16384, 128, True, "forward", 0.73 * 312),
    ("dgx-a100", 1, 16, 16384, 128, True, "backward", 0.63 * 312),
]


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: "-".join(map(str, row)))
def test_published_kernel_speeds(
    row: tuple[str, int, int, int, int, bool, Direction, float],
) -> None:
    where, batch, heads, tokens, dim, full, direction, published = row
    pairs = tokens * tokens if full else tokens * (tokens + 1) // 2
    whole = Span(0, tokens)
    some = Tile(whole, whole, Span(0, heads), None, None if full else 0, pairs)
    one = problem(heads, heads, dim, dim)
    seconds = tile_seconds(some, one, "bfloat16", direction, load_cluster(where), batch)
    flops = batch * attention_flops(pairs, heads, dim, dim, direction)
    assert flops / seconds / 1e12 == pytest.approx(published, rel=0.015)


def test_small_tiles_are_slow() -> None:
    on, one = load_cluster("dgx-h100"), problem(8, 8, 128, 128)
    speeds = []
    for tokens in (64, 256, 1024, 4096, 16384):
        seconds = tile_seconds(tile(tokens**2, tokens, 8), one, "bfloat16", "forward", on)
        speeds.append(attention_flops(tokens**2, 8, 128, 128, "forward") / seconds)
    assert speeds == sorted(speeds)
    assert speeds[0] < 0.02 * speeds[-1]
