# SPDX-License-Identifier: Apache-2.0
"""What holds of every timeline: for any plan, and for the real schedules on the real clusters."""

from __future__ import annotations

import time
from collections import defaultdict
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_seqpar.attention import Schedule, build_schedule
from megatron_seqpar.attention.ir import ITEM_SIZES, PARTS, RETURNS
from megatron_seqpar.simulate import (
    Cluster,
    EventKind,
    Timeline,
    cluster_names,
    costs,
    load_cluster,
    predict,
    simulate,
)
from megatron_seqpar.simulate.perfetto import track_of
from megatron_seqpar.simulate.timeline import OF_THE_RANK

from .plans import Move, Work, cluster, faster, schedule

NEAR = 1e-9
BUILDERS = ("balanced", "zigzag", "ring", "allgather", "ulysses", "ulysses+balanced")


@st.composite
def plans(draw: st.DrawFn, contended: bool = True) -> Schedule:
    """Any work and moves of up to five ranks; uncontended: each port has one message a step."""
    size = draw(st.integers(1, 5))
    ranks, steps = st.integers(0, size - 1), st.integers(0, 3)
    work = draw(st.lists(st.builds(Work, steps, ranks, st.integers(1, 9)), max_size=12))
    tokens = st.integers(1, 9)
    if contended:
        moves = draw(st.lists(st.tuples(steps, ranks, ranks, tokens), max_size=14))
        return schedule(size, work, [Move(*m) for m in moves if m[1] != m[2]])
    shifts = draw(st.lists(ranks, min_size=4, max_size=4))
    moves = [
        Move(step, src, (src + shift) % size, draw(tokens))
        for step, shift in enumerate(shifts)
        for src in range(size)
        if shift and draw(st.booleans())
    ]
    return schedule(size, work, moves)


CLUSTERS = st.builds(
    cluster,
    ranks_per_node=st.integers(1, 5),
    bandwidth=st.sampled_from((4.0, 8.0, 1.0)),
    network=st.sampled_from((4.0, 0.5)),
    latency=st.sampled_from((0.0, 0.5)),
    adapters=st.integers(1, 2),
    overhead=st.sampled_from((0.0, 0.25)),
    duplex=st.booleans(),
    one_port=st.booleans(),
    tax=st.sampled_from((0.0, 0.5, 1.0)),
)


def check(timeline: Timeline, plan: Any, on: Cluster) -> None:
    """No rank does two things at once, no link carries two messages at once, sums add up."""
    carried: dict[Any, list[tuple[float, float]]] = defaultdict(list)
    moved: dict[Any, int] = defaultdict(int)
    for rank, events in enumerate(timeline.events):
        own = [event for event in events if event.kind in OF_THE_RANK]
        assert all(a.stop <= b.start + NEAR for a, b in pairwise(own))
        for event in events:
            assert event.rank == rank
            if event.kind in OF_THE_RANK:
                continue
            moved[event.subject, event.kind, event.start, event.stop] += 1
            ways = [event.kind if on.duplex else "both"]
            network = "port" if on.one_port else event.within_node
            carried[rank, network, *ways].append((event.start, event.stop))
            if not event.within_node:
                carried["adapters", on.node(rank), *ways].append((event.start, event.stop))
        # a rank is always doing something until it is done
        assert timeline.finish[rank] == pytest.approx(timeline.busy[rank] + timeline.wait[rank])
        assert sum(event.seconds for event in own) == pytest.approx(timeline.finish[rank])
        assert timeline.exposed[rank] <= timeline.wait[rank] + NEAR
    for where, intervals in carried.items():
        most = int(on.adapters.value) if where[0] == "adapters" else 1
        assert at_once(intervals) <= most, where
    transfers = [t for steps in plan.plan for step in steps for t in step.sends]
    sends = [key for key in moved if key[1] is EventKind.SEND]
    assert sorted(moved.values()) == [1] * (2 * len(transfers))
    assert {key[0] for key in sends} == set(transfers)
    for subject, _, start, stop in sends:
        assert (subject, EventKind.RECEIVE, start, stop) in moved
    assert timeline.makespan == max(timeline.finish)
    assert timeline.makespan >= max(timeline.busy) - NEAR


def at_once(intervals: list[tuple[float, float]]) -> int:
    """The most intervals that share a moment."""
    ends = sorted(
        [(start + NEAR, 1) for start, stop in intervals if stop > start + 2 * NEAR]
        + [(stop - NEAR, -1) for start, stop in intervals if stop > start + 2 * NEAR]
    )
    most = now = 0
    for _, change in ends:
        now += change
        most = max(most, now)
    return most


def least_time(timeline: Timeline, on: Cluster) -> float:
    """Bytes of the busiest rank over all its ports together."""
    ports = on.intra.bandwidth + (0 if on.one_port else on.inter.bandwidth)
    return max(timeline.bytes_sent) / max(ports, on.inter.bandwidth)


@settings(max_examples=200, deadline=None)
@given(plans(), CLUSTERS, st.booleans())
def test_any_plan(plan: Schedule, on: Cluster, overlap: bool) -> None:
    timeline = simulate(plan, on, overlap=overlap)
    check(timeline, plan, on)
    assert timeline.makespan >= least_time(timeline, on) - NEAR


@settings(max_examples=200, deadline=None)
@given(plans(), CLUSTERS)
def test_messages_of_a_pair_keep_their_order(plan: Schedule, on: Cluster) -> None:
    started = defaultdict(list)
    for events in simulate(plan, on).events:
        for event in events:
            if event.kind is EventKind.SEND:
                started[event.subject.src, event.subject.dst].append(event)
    for (src, dst), events in started.items():
        posted = [t for step in plan.plan[src] for t in step.sends if t.dst == dst]
        assert [event.subject for event in events] == posted


@settings(max_examples=200, deadline=None)
@given(plans(contended=False), st.sampled_from((0.0, 0.5)), st.sampled_from((0.0, 0.25)))
def test_overlap_and_faster_links_never_cost_time(
    plan: Schedule, latency: float, overhead: float
) -> None:
    """Where nobody waits for a port. Where they do, who comes first can change for the worse."""
    on = cluster(latency=latency, overhead=overhead)
    overlapped, waited = (simulate(plan, on, overlap=each).makespan for each in (True, False))
    assert overlapped <= waited + NEAR
    for overlap in (True, False):
        before = simulate(plan, on, overlap=overlap).makespan
        after = simulate(plan, faster(on, 2.0), overlap=overlap).makespan
        assert after <= before + NEAR


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("where", ["dgx-h100", "dgx-a100-100g", "pcie-box", "laptop"])
def test_real_schedules(name: str, where: str) -> None:
    plan = build_schedule(
        name, size=16, seq_length=16 * 1024, query_heads=16, kv_heads=4, node_size=8
    )
    on = load_cluster(where).with_ranks_per_node(8)
    for each in (plan, plan.backward()):
        overlapped = simulate(each, on)
        waited = simulate(each, on, overlap=False)
        for timeline in (overlapped, waited):
            check(timeline, each, on)
            assert timeline.makespan >= least_time(timeline, on)
            assert sum(timeline.compute) >= sum(waited.compute) * (1 - NEAR)
        assert overlapped.makespan <= waited.makespan
        sent = tuple(each.bytes_sent(rank) for rank in range(16))
        assert overlapped.bytes_sent == waited.bytes_sent == sent
        messages = tuple(each.messages_sent(rank) for rank in range(16))
        assert overlapped.messages_sent == messages


@pytest.mark.parametrize("name", BUILDERS)
def test_real_schedules_gain_from_faster_links(name: str) -> None:
    plan = build_schedule(name, size=16, seq_length=16384, query_heads=16, kv_heads=4, node_size=8)
    on = load_cluster("dgx-a100-100g")
    times = [predict(plan, faster(on, factor)) for factor in (0.1, 0.25, 1, 4, 16, 1e6)]
    for slow, fast in pairwise(times):
        # within a percent: who takes a busy port first may change
        assert fast.forward_s <= slow.forward_s * 1.01
        assert fast.backward_s <= slow.backward_s * 1.01
    assert times[-1].total_s < times[0].total_s


def test_a_prediction_is_both_passes() -> None:
    on = load_cluster("dgx-a100")
    plan = build_schedule("balanced", size=8, seq_length=8192, query_heads=8, kv_heads=2)
    forward, backward = simulate(plan, on), simulate(plan.backward(), on)
    got = predict(plan, on)
    assert (got.forward_s, got.backward_s) == (forward.makespan, backward.makespan)
    both = [a + b for a, b in zip(forward.bytes_sent, backward.bytes_sent, strict=True)]
    assert (got.bytes_total, got.bytes_busiest) == (sum(both), max(both))
    tiles = sum(forward.compute) + sum(backward.compute)
    assert got.idle_fraction == pytest.approx(1 - tiles / (8 * got.total_s))
    assert 0 < got.forward_wait_share == forward.wait_share < 1
    assert predict(plan, on, overlap=False).total_s > got.total_s


def test_a_balanced_schedule_waits_less_than_a_ring() -> None:
    for where in cluster_names():
        on = load_cluster(where)
        balanced, ring = (
            predict(build_schedule(n, size=8, seq_length=65536, query_heads=8), on, "float32")
            for n in ("balanced", "ring")
        )
        assert balanced.total_s < 0.75 * ring.total_s, where
        assert balanced.idle_fraction < ring.idle_fraction


def test_thousands_of_transfers_take_a_moment() -> None:
    plan = build_schedule("ring", size=64, seq_length=64 * 1024, query_heads=8)
    on = load_cluster("dgx-h100")
    assert sum(len(step.sends) for steps in plan.plan for step in steps) == 4032
    seconds = []
    for _ in range(5):  # processor time, and the best: the machine may be busy
        begin = time.thread_time()
        simulate(plan, on, events=False)
        seconds.append(time.thread_time() - begin)
    assert min(seconds) < 0.3


def test_no_track_of_a_trace_has_two_bars_at_once() -> None:
    plan = build_schedule(
        "ulysses+balanced", size=16, seq_length=16384, query_heads=16, node_size=8
    )
    timeline = simulate(plan, load_cluster("dgx-a100-100g"))
    for events in timeline.events:
        tracks = defaultdict(list)
        for event in events:
            tracks[track_of(event)].append((event.start, event.stop))
        assert {"compute", "send", "receive"} <= set(tracks)
        assert all(at_once(intervals) == 1 for intervals in tracks.values())


def test_what_the_room_repeats_of_attention_agrees_with_it() -> None:
    assert {str(payload): count for payload, count in PARTS.items()} == costs.MESSAGES
    assert {str(payload) for payload in RETURNS} == costs.RETURNS
    assert costs.ITEM_SIZES == ITEM_SIZES
