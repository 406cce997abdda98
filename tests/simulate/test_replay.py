# SPDX-License-Identifier: Apache-2.0
"""Timelines worked out by hand, exact to the second."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_seqpar.attention import build_schedule
from megatron_seqpar.errors import ClusterError, ScheduleError
from megatron_seqpar.simulate import EventKind, Timeline, predict, simulate

from .plans import Move, Work, cluster, curve, schedule


def shown(timeline: Timeline, rank: int) -> list[tuple[str, float, float]]:
    """A rank's events as (kind, start, stop)."""
    return [(str(e.kind), e.start, e.stop) for e in timeline.events[rank]]


def run(plan: Any, on: Any = None, **options: Any) -> Timeline:
    return simulate(plan, on or cluster(), **options)


# rank 0 sends three tokens, which rank 1 needs for its second tile
TWO = schedule(2, [Work(0, 0, 2), Work(0, 1, 5), Work(1, 1, 4)], [Move(0, 0, 1, 3)])


def test_two_ranks_overlapped() -> None:
    timeline = run(TWO, cluster(latency=0.5))
    assert shown(timeline, 0) == [("compute", 0, 2), ("send", 0, 3), ("wait", 2, 3.5)]
    assert shown(timeline, 1) == [("compute", 0, 5), ("receive", 0, 3), ("compute", 5, 9)]
    assert timeline.makespan == 9
    assert timeline.finish == (3.5, 9)
    assert timeline.compute == (2, 9)
    assert timeline.wait == (1.5, 0)
    assert timeline.exposed == (1.5, 0)
    assert timeline.bytes_sent == (12, 0)
    assert timeline.messages_sent == (2, 0)
    assert timeline.after_finish == (5.5, 0)
    assert timeline.wait_share == 1.5 / 18
    assert timeline.idle_fraction == 1 - 11 / 18


def test_two_ranks_without_overlap() -> None:
    timeline = run(TWO, cluster(latency=0.5), overlap=False)
    assert shown(timeline, 0) == [("wait", 0, 3.5), ("send", 0, 3), ("compute", 3.5, 5.5)]
    assert shown(timeline, 1) == [
        ("wait", 0, 3.5),
        ("receive", 0, 3),
        ("compute", 3.5, 8.5),
        ("compute", 8.5, 12.5),
    ]
    assert timeline.makespan == 12.5
    assert timeline.wait == (3.5, 3.5)


def test_posting_takes_its_time_at_both_ends() -> None:
    timeline = run(TWO, cluster(overhead=0.25))  # two messages, keys and values
    assert shown(timeline, 0) == [
        ("post", 0, 0.5),
        ("compute", 0.5, 2.5),
        ("send", 0.5, 3.5),
        ("wait", 2.5, 3.5),
    ]
    assert timeline.post == (0.5, 0.5)
    assert timeline.makespan == 9.5


def test_a_transfer_waits_for_the_end_that_is_late() -> None:
    plan = schedule(2, [Work(0, 0, 1), Work(0, 1, 10), Work(1, 0, 1)], [Move(1, 0, 1, 3)])
    timeline = run(plan)
    assert shown(timeline, 0) == [
        ("compute", 0, 1),
        ("compute", 1, 2),
        ("wait", 2, 13),
        ("send", 10, 13),
    ]
    assert shown(timeline, 1) == [("compute", 0, 10), ("wait", 10, 13), ("receive", 10, 13)]
    # rank 0 stood still from 2 to 10 for rank 1 and only then for the transfer
    assert timeline.wait == (11, 3)
    assert timeline.exposed == (3, 3)


def test_a_port_carries_one_message_at_a_time() -> None:
    # out of rank 0 one after the other; into rank 0 as well; the two directions side by side
    moves = [Move(0, 0, 1, 3), Move(0, 0, 2, 3), Move(0, 1, 0, 2), Move(0, 2, 0, 2)]
    timeline = run(schedule(3, [], moves))
    assert [e for e in shown(timeline, 0) if e[0] == "send"] == [("send", 0, 3), ("send", 3, 6)]
    assert [e for e in shown(timeline, 0) if e[0] == "receive"] == [
        ("receive", 0, 2),
        ("receive", 2, 4),
    ]
    assert timeline.finish == (6, 3, 6)


def test_three_ranks_in_a_ring() -> None:
    work = [Work(step, rank, 4) for step in range(3) for rank in range(3)]
    moves = [Move(step, rank, (rank + 1) % 3, 5) for step in range(2) for rank in range(3)]
    timeline = run(schedule(3, work, moves))
    for rank in range(3):
        assert [e for e in shown(timeline, rank) if e[0] in ("compute", "wait")] == [
            ("compute", 0, 4),
            ("wait", 4, 5),
            ("compute", 5, 9),
            ("wait", 9, 10),
            ("compute", 10, 14),
        ]
    assert timeline.wait_share == pytest.approx(2 / 14)
    assert run(schedule(3, work, moves), overlap=False).makespan == 22


def test_the_adapters_of_a_node_are_shared() -> None:
    plan = schedule(4, [], [Move(0, 0, 2, 3), Move(0, 1, 3, 3)])
    assert run(plan, cluster(ranks_per_node=2, adapters=2)).finish == (3, 3, 3, 3)
    assert run(plan, cluster(ranks_per_node=2, adapters=1)).finish == (3, 6, 3, 6)
    # within a node nobody needs an adapter
    assert run(plan, cluster(ranks_per_node=4, adapters=1)).finish == (3, 3, 3, 3)


def test_links_between_nodes_have_their_own_speed_and_port() -> None:
    plan = schedule(4, [], [Move(0, 0, 1, 3), Move(0, 0, 2, 3)])
    two_nodes = {"ranks_per_node": 2, "network": 2.0}
    assert run(plan, cluster(**two_nodes)).finish == (6, 3, 6, 0)
    assert run(plan, cluster(**two_nodes, one_port=True)).finish == (9, 3, 9, 0)


def test_half_duplex() -> None:
    plan = schedule(2, [], [Move(0, 0, 1, 3), Move(0, 1, 0, 2)])
    assert run(plan, cluster()).makespan == 3
    assert run(plan, cluster(duplex=False)).makespan == 5


def test_transfers_that_wait_take_the_port_in_the_order_of_readiness() -> None:
    # rank 3's holds the port until 10; rank 2 posts at 1, rank 1 at 2, though rank 0 posts rank
    # 1's receive first
    moves = [Move(0, 3, 0, 10), Move(1, 1, 0, 4, received=0), Move(1, 2, 0, 4, received=0)]
    timeline = run(schedule(4, [Work(0, 1, 2), Work(0, 2, 1)], moves))
    received = [
        (event.subject.src, event.start, event.stop)
        for event in timeline.events[0]
        if event.kind is EventKind.RECEIVE
    ]
    assert received == [(3, 0, 10), (2, 10, 14), (1, 14, 18)]


def test_messages_of_a_pair_never_overtake_one_another() -> None:
    # the first waits for rank 2's port in, the second for rank 0's port out; both come free at 6
    moves = [Move(0, 0, 2, 6), Move(0, 0, 2, 1), Move(0, 0, 1, 2), Move(0, 0, 2, 2)]
    timeline = run(schedule(3, [], moves))
    sizes = [e.size for e in timeline.events[2] if e.kind is EventKind.RECEIVE]
    assert sizes == [24, 4, 8]


def test_copying_by_the_computing_core_slows_it_down() -> None:
    timeline = run(TWO, cluster(tax=1.0))
    # rank 0: 2 s of tiles meet 3 s of transfer, of which 2 s overlap: 4 s; rank 1: 5 s + 3 s
    assert shown(timeline, 0) == [("compute", 0, 4), ("send", 0, 3)]
    assert shown(timeline, 1) == [("compute", 0, 8), ("receive", 0, 3), ("compute", 8, 12)]
    assert run(TWO, cluster(tax=1.0), overlap=False).makespan == 12


def test_backward_takes_two_and_a_half_times_the_flops() -> None:
    plan = schedule(1, [Work(0, 0, 4)], [], "backward")
    assert run(plan).makespan == 10


def test_partial_results_are_summed_where_they_are_computed() -> None:
    # two tiles of one query; 22 bytes: a bf16 partial, an fp32 sum twice, an fp32 LSE three times
    work = [Work(0, 0, 4), Work(1, 0, 3)]
    assert shown(run(schedule(1, work, []), cluster(memory=44.0)), 0) == [
        ("compute", 0, 4),
        ("compute", 4, 7),
        ("merge", 7, 7.5),
    ]
    # backward: dq (10 bytes) twice to one sum; dk and dv to sums of their own, as keys differ
    timeline = run(schedule(1, work, [], "backward"), cluster(memory=20.0))
    assert timeline.merge == (0.5,)
    again = [*work, Work(1, 0, 4)]  # the keys of the first: 4 x 20 bytes, and dq
    timeline = run(schedule(1, again, [], "backward"), cluster(memory=20.0))
    assert timeline.merge == (0.5 + 0.5 + 4,)


def test_a_batch_multiplies_work_and_bytes() -> None:
    timeline = run(TWO, batch=3)
    assert timeline.compute == (6, 27)
    assert timeline.bytes_sent == (36, 0)
    wide = run(TWO, dtype="float32")
    assert wide.bytes_sent == (24, 0)


def test_a_kernel_launch_is_paid_by_every_tile() -> None:
    plan = schedule(1, [Work(0, 0, 4), Work(0, 0, 4)], [])
    assert run(plan, cluster(kernel=curve(launch=0.5))).makespan == 9


def test_events_can_be_left_out() -> None:
    timeline = run(TWO, events=False)
    assert timeline.events == ()
    assert timeline.makespan == run(TWO).makespan


def test_a_receive_without_its_send_is_refused() -> None:
    step = TWO.plan[0][0]
    broken = TWO.replace_step(0, 0, sends=())
    assert step.sends
    with pytest.raises(ScheduleError, match="rank 1 waits for ever at step 0"):
        run(broken)


def test_transfers_that_do_not_match_are_refused() -> None:
    other = schedule(2, [], [Move(0, 0, 1, 4)]).plan[0][0].sends
    with pytest.raises(ScheduleError, match="rank 0 sends 1 and rank 1 expects"):
        run(TWO.replace_step(0, 0, sends=other))


def test_a_dtype_without_a_peak_is_refused() -> None:
    with pytest.raises(ClusterError, match=r"nothing of dtype=float64; it has bfloat16, float32"):
        run(TWO, dtype="float64")
    with pytest.raises(ClusterError, match="dtype=int4: use one of float64"):
        run(TWO, dtype="int4")


def test_labels() -> None:
    timeline = run(TWO)
    labels = {event.kind: event.label for event in timeline.events[0]}
    assert labels[EventKind.COMPUTE] == "tile q[0,1) kv[0,2)"
    assert labels[EventKind.SEND] == "kv [0,3) to 1"
    assert labels[EventKind.WAIT] == "wait 0"
    assert {e.label for e in timeline.events[1]} >= {"kv [0,3) from 0"}


def test_one_rank_never_waits() -> None:
    one = predict(build_schedule("balanced", size=1, seq_length=8, head_dim=1), cluster())
    assert (one.forward_s, one.backward_s, one.total_s) == (36, 90, 126)
    assert one.forward_wait_share == one.backward_wait_share == one.idle_fraction == 0
    assert one.bytes_total == one.messages_busiest == 0
