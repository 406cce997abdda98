# SPDX-License-Identifier: Apache-2.0
"""`auto` against every fixed choice: in the model of a cluster, and by bytes."""

import random

import pytest
import torch

from benchmarks.volumes import published
from megatron_seqpar.attention import Causal, Documents, Full, Mask, SlidingWindow, TokenLayout
from megatron_seqpar.attention.schedules import BUILDERS, build_schedule, explain, make_problem
from megatron_seqpar.errors import ClusterError, ScheduleError
from megatron_seqpar.simulate import load_cluster, predict
from tests.support.sharded import on_threads
from tests.support.truth import attention, inputs, largest_difference


def _documents(seq_length: int, median: float, seed: int) -> Documents:
    """Log-normal lengths, packed to the end."""
    pick, ends = random.Random(seed), [0]
    while ends[-1] < seq_length:
        ends.append(min(seq_length, ends[-1] + 1 + int(pick.lognormvariate(median, 1.4))))
    return Documents(tuple(ends))


@pytest.mark.parametrize("cluster", ["dgx-h100", "dgx-a100-100g", "pcie-box", "laptop"])
@pytest.mark.parametrize("seq_length", [2_048, 32_768, 262_144])
def test_no_fixed_choice_is_faster_in_the_model(cluster: str, seq_length: int) -> None:
    machine = load_cluster(cluster).with_ranks_per_node(4)
    for size, heads, kv_heads, mask in (
        (8, 32, 8, Causal()),
        (8, 33, 33, Causal()),
        (4, 8, 1, SlidingWindow(4095)),
        (8, 40, 8, Full()),
    ):
        problem = make_problem(
            size=size, seq_length=seq_length, mask=mask, query_heads=heads, kv_heads=kv_heads,
            node_size=4,
        )  # fmt: skip
        choice = explain(problem, cluster=machine)
        best = choice.candidates[0].prediction
        assert best is not None
        for name in BUILDERS:
            try:
                fixed = build_schedule(
                    name, layout=problem.layout, mask=mask, query_heads=heads, kv_heads=kv_heads,
                    node_size=4,
                )  # fmt: skip
            except ScheduleError:
                assert any(c.name == name and c.refusal for c in choice.candidates)
                continue
            assert best.total_s <= predict(fixed, machine).total_s * 1.0001, name


@pytest.mark.parametrize("seed", range(4))
def test_packed_documents_get_within_3_percent_of_the_best_fixed_choice(seed: int) -> None:
    """Fewer candidates are built for them, since every batch has its own packing."""
    machine = load_cluster("dgx-h100").with_ranks_per_node(8)
    mask = _documents(65_536, 7.6, seed)
    problem = make_problem(size=8, seq_length=65_536, mask=mask, query_heads=32, kv_heads=8)
    best = explain(problem, cluster=machine).candidates[0].prediction
    assert best is not None
    for name in ("zigzag", "ring", "allgather", "ulysses", "solver"):
        fixed = build_schedule(name, layout=problem.layout, mask=mask, query_heads=32, kv_heads=8)
        assert best.total_s <= predict(fixed, machine).total_s * 1.03, name


def test_short_sequences_get_what_costs_nothing() -> None:
    """At 512 tokens messages and launches are all that counts: the fewest steps win."""
    choice = explain(make_problem(size=8, seq_length=512, query_heads=32, kv_heads=8))
    steps = [len(c.schedule.plan[0]) for c in choice.candidates if c.schedule is not None]
    assert len(choice.schedule.plan[0]) == min(steps)


def test_few_heads_and_slow_links_between_nodes_get_a_schedule_for_nodes() -> None:
    problem = make_problem(size=16, seq_length=65_536, query_heads=33, kv_heads=33, node_size=8)
    choice = explain(problem, cluster=load_cluster("dgx-a100-100g"))
    assert "+" in choice.schedule.name
    assert choice.why().startswith(choice.schedule.name)


@pytest.mark.parametrize("group", [1, 2, 4, 8, 16, 32])
def test_by_bytes_auto_sends_no_more_than_the_published_schedules(group: int) -> None:
    for size in (2, 3, 4, 5, 8, 13, 16, 32):
        tokens = size * 256
        problem = make_problem(
            size=size, seq_length=tokens, query_heads=32, kv_heads=32 // group, head_dim=128
        )
        choice = explain(problem, objective="bytes")
        least = min(published(size, 32 // group, chunk=256).values())
        assert choice.candidates[0].bytes_total <= least * (1 + 1e-9), (size, choice.why())
        assert choice.schedule.verify()


@pytest.mark.parametrize("mask", [Causal(), SlidingWindow(9), Documents((0, 20, 31, 60))])
def test_auto_is_right_and_sends_what_it_said(mask: Mask) -> None:
    data = inputs(1, 60, 4, 2, 8)
    truth = attention(data, mask=mask)
    for size in (1, 2, 3, 5):
        layout = TokenLayout.contiguous(size, seq_length=60)
        got, counters = on_threads(data, layout.lengths, mask=mask)
        assert max(largest_difference(got, truth).values()) < 1e-8
        plan = build_schedule(
            "auto", layout=layout, mask=mask, query_heads=4, kv_heads=2, head_dim=8,
            dtype=torch.float64, device="cpu",
        )  # fmt: skip
        for rank, counted in enumerate(counters):
            assert counted.bytes == sum(
                plan.bytes_sent(rank, d, torch.float64) for d in ("forward", "backward")
            )


def test_wrong_wishes_are_refused() -> None:
    problem = make_problem(size=2, seq_length=8)
    with pytest.raises(ScheduleError, match="objective='luck': use one of time, bytes"):
        explain(problem, objective="luck")  # type: ignore[arg-type]
    with pytest.raises(ClusterError, match="unknown; use one of"):
        load_cluster("dgx-z")
