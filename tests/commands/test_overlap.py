# SPDX-License-Identifier: Apache-2.0
"""benchmarks/overlap.py: its arithmetic, and a small run of it."""

import json
import sys
from pathlib import Path

import pytest
import torch

from megatron_seqpar.attention.execute import Execution
from megatron_seqpar.attention.transport import ThreadTransport
from tests.commands.test_two_hosts import left_behind, needs_hosts

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
CASE = {
    "schedule": "balanced",
    "mask": "causal",
    "ranks": 2,
    "ranks_per_host": 1,
    "tokens": 256,
    "heads": 8,
    "kv_heads": 2,
    "head_dim": 16,
}


@pytest.fixture(scope="module", autouse=True)
def _benchmarks_on_the_path():
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


def test_bound_of_two_ranks():
    """By hand, for a token of a chunk, P = 2, a group of 4 and fp32 (in units of one KV head's d).

    The diagonal computes half, the cut tile the other half. Rank 1 sends half its queries (4), gets
    the output back; rank 0 sends K and V (2 for each token of its chunk, here 2 x 2 heads).
    """
    import overlap
    from overlap_rank import plan_of

    plan = plan_of(CASE)
    bound = overlap.bound(plan, 1)
    # forward: fetch max(kv 2*2, half of 8 queries 4) = 4; return half of 8 outputs and LSE 4 + 1/4
    # backward: fetch half of 8 (q and dout) 8 and LSE, delta 1/2; return half of dq 4, or dkv 4
    work = [0.5, 0.5, 0, 1.25, 1.25, 0]
    moved = [4, 0, 4.25, 8.5, 0, 4]
    scale = sum(work) / sum(moved)
    best = sum(max(c, scale * x) for c, x in zip(work, moved, strict=True))
    assert bound == pytest.approx(2 * sum(work) / best, rel=0.02)  # the diagonal itself is left out


def test_bytes_between_hosts_are_those_that_cross():
    from overlap_rank import bytes_between_hosts, plan_of

    both = [
        sum(plan.bytes_sent(rank, plan.direction, "float32") for plan in (way, way.backward()))
        for way in [plan_of(CASE)]
        for rank in range(2)
    ]
    assert bytes_between_hosts(plan_of(CASE), 1) == max(both)
    four = plan_of({**CASE, "ranks": 4, "ranks_per_host": 2})
    every = sum(
        plan.bytes_sent(rank, plan.direction, "float32")
        for plan in (four, four.backward())
        for rank in range(4)
    )
    assert 0 < bytes_between_hosts(four, 2) < every / 2


def test_a_kernel_that_computes_nothing_moves_everything():
    from overlap_rank import NoKernel, plan_of

    plan = plan_of(CASE)

    def body(transport: ThreadTransport) -> tuple[int, float]:
        q, dout = (torch.ones(1, 128, 8, 16) for _ in range(2))
        k, v = (torch.ones(1, 128, 2, 16) for _ in range(2))
        run = Execution(plan, transport, NoKernel(), 1.0)
        out, lse = run.forward(q, k, v)
        grads = run.backward(dout, q, k, v, out, lse)
        return transport.counters.bytes, sum(t.abs().sum().item() for t in (out, *grads))

    for rank, (sent, total) in enumerate(ThreadTransport.run(2, body)):
        planned = sum(
            plan.bytes_sent(rank, direction, "float32") for direction in ("forward", "backward")
        )
        assert sent == planned
        assert total == 0


@needs_hosts
@pytest.mark.slow
def test_small_run(tmp_path):
    import overlap

    before = left_behind()
    overlap.main(
        case=["balanced:1"],
        tokens=512,
        rounds=2,
        training_tokens=256,
        output=tmp_path / "result.json",
        work=tmp_path / "work",
    )
    assert left_behind() <= before
    result = json.loads((tmp_path / "result.json").read_text())
    (case,) = result["cases"]
    assert len(case["ratio_by_round"]) == 2
    assert case["transfer_seconds_alone"] > 0
    assert (tmp_path / "result.png").stat().st_size > 10_000
    for totals in result["training"]["by_rank"].values():
        assert totals["tile"] > 0
        assert totals["bytes"] > 0
