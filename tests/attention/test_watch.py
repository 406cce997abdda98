# SPDX-License-Identifier: Apache-2.0
"""A watched transport: the same messages, and when each of them ended."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from megatron_seqpar.attention.counters import Counters
from megatron_seqpar.attention.ir import Payload, Transfer
from megatron_seqpar.attention.layouts import Span
from megatron_seqpar.attention.recorder import Event, Labelled, TimedRecorder
from megatron_seqpar.attention.transport import (
    LocalTransport,
    Message,
    ProcessGroupTransport,
    ThreadTransport,
)
from megatron_seqpar.attention.watch import WatchedTransport
from tests.support.pool import GlooPool

TOKENS = 64
KV_BYTES = 2 * 4 * TOKENS
HEADS = Span(0, 1)


def transfer(payload: Payload, src: int, dst: int, start: int = 0) -> Transfer:
    return Transfer(payload, Span(start, start + TOKENS), src, dst, HEADS)


def all_over(pending) -> None:
    """A tile that lasts until every message was seen to end, or for a minute."""
    for work in pending.works:
        work.over.wait(60)


def swap(watched, recorder, tile=lambda pending: None) -> torch.Tensor:
    """As the executor does it: keys and values to the peer and from it, under a tile."""
    me, peer = watched.rank, 1 - watched.rank
    plan = (transfer(Payload.KV, me, peer),), (transfer(Payload.KV, peer, me, TOKENS),)
    sends = [Message(peer, torch.full((TOKENS,), me + value), "kv") for value in (0.0, 10.0)]
    receives = [Message(peer, torch.empty(TOKENS), "kv") for _ in range(2)]
    labelled = Labelled(recorder, layer=4)
    with labelled.span("post", step=2, transfers=plan, direction="forward"):
        pending = watched.exchange(sends, receives)
    with labelled.span("tile", step=2):
        tile(pending)
    with labelled.span("wait", step=2, transfers=plan, direction="forward"):
        pending.wait()
    return torch.stack([message.tensor for message in receives])


def on_rank(rank: int, times: int) -> tuple[float, list[Event], int, int]:
    """Swap `times` times."""
    import torch.distributed as dist

    bare = ProcessGroupTransport(dist.group.WORLD)
    recorder = TimedRecorder()
    watched = WatchedTransport(bare, recorder)
    watched.prepare(torch.device("cpu"))
    arrived = sum(swap(watched, recorder, all_over).sum().item() for _ in range(times))
    threads = threading.active_count()
    watched.close()
    swap(bare, TimedRecorder())  # the transport beneath is as it was
    return arrived, watched.events() + recorder.events(), bare.counters.bytes, threads


def rank_1_late(rank: int, delay: float) -> list[Event]:
    """Swap once; rank 1 posts `delay` seconds after rank 0 did, however busy the machine is."""
    import torch.distributed as dist

    recorder, store = TimedRecorder(), dist.distributed_c10d._get_default_store()
    watched = WatchedTransport(ProcessGroupTransport(dist.group.WORLD), recorder)
    watched.prepare(torch.device("cpu"))

    def tile(pending) -> None:
        store.set(f"test_watch/posted/{rank}", "")
        all_over(pending)

    if rank == 1:
        store.wait(["test_watch/posted/0"])
        time.sleep(delay)
    swap(watched, recorder, tile)
    watched.close()
    return watched.events() + recorder.events()


@pytest.fixture(scope="module")
def pool() -> Iterator[GlooPool]:
    pool = GlooPool(2)
    yield pool
    pool.stop()


def named(events: list[Event], name: str) -> list[Event]:
    return [event for event in events if event.name == name]


def test_what_arrives_is_the_same_and_is_counted_once(pool):
    for rank, (arrived, events, sent, threads) in enumerate(pool.run(on_rank, 3)):
        assert arrived == 3 * TOKENS * (2 * (1 - rank) + 10)
        assert sent == 4 * KV_BYTES  # three watched, one bare
        assert len(named(events, "send")) == len(named(events, "receive")) == 3
        assert threads >= 3  # one a link, not one a message


def test_facts_of_a_transfer(pool):
    results = pool.run(on_rank, 2)
    for rank, (_, events, _, _) in enumerate(results):
        for name in ("send", "receive"):
            first, second = named(events, name)
            assert first.details == {
                "peer": 1 - rank,
                "number": 0,
                "bytes": KV_BYTES,
                "queued_us": 0,
                "payload": "kv",
                "layer": 4,
                "step": 2,
                "direction": "forward",
                "tokens": "[0,64)" if name == "send" else "[64,128)",
                "heads": "[0,1)",
            }
            assert second.details["number"] == 1
            assert second.begin >= first.end  # one after the other on their link


def test_an_end_is_seen_when_it_comes_and_not_when_it_is_waited_for(pool):
    early, late = pool.run(rank_1_late, 0.2)
    for events in (early, late):
        (received,), (tile,), (waited,) = (named(events, n) for n in ("receive", "tile", "wait"))
        assert received.end <= tile.end <= waited.begin
    (received,), (sent,) = named(early, "receive"), named(late, "send")
    # rank 0 posts early: its receive lasts until the late peer sends (processes share the clock)
    assert received.seconds >= 0.2
    assert received.end >= sent.begin


class FailingWork:
    def wait(self) -> None:
        raise RuntimeError("the link broke")


class Posted:
    def __init__(self, works) -> None:
        self.works = works

    def wait(self) -> None:
        for work in self.works:
            work.wait()


class BrokenTransport(LocalTransport):
    rank, size = 0, 2

    def exchange(self, sends, receives):
        return Posted([FailingWork() for _ in (*sends, *receives)])


def test_a_failure_of_a_transfer_is_raised_where_the_executor_waits():
    recorder = TimedRecorder()
    watched = WatchedTransport(BrokenTransport(), recorder)
    with pytest.raises(RuntimeError, match="the link broke"):
        swap(watched, recorder)
    watched.close()
    assert watched.events() == []


def test_transports_that_tell_no_ends_are_timed_by_the_wait():
    def body(bare: ThreadTransport) -> list[Event]:
        recorder = TimedRecorder()
        watched = WatchedTransport(bare, recorder)
        assert swap(watched, recorder, lambda pending: time.sleep(0.05)).sum().item() == TOKENS * (
            2 * (1 - bare.rank) + 10
        )
        watched.close()
        return watched.events() + recorder.events()

    for events in ThreadTransport.run(2, body):
        (received,), (waited,) = named(events, "receive"), named(events, "wait")
        assert waited.begin <= received.end <= waited.end


def test_messages_that_the_plan_does_not_name_are_shown_one_by_one():
    recorder = TimedRecorder()
    watched = WatchedTransport(BrokenTransport(), recorder)
    watched.inner.exchange = lambda sends, receives: Posted([])  # type: ignore[method-assign]
    sends = [Message(1, torch.zeros(3), "kv"), Message(1, torch.zeros(5), "q")]
    watched.exchange(sends, []).wait()
    assert [(e.details["payload"], e.details["bytes"]) for e in watched.events()] == [
        ("kv", 12),
        ("q", 20),
    ]


def test_nothing_to_move_is_passed_through():
    watched = WatchedTransport(LocalTransport(), TimedRecorder())
    watched.exchange([], []).wait()
    assert watched.events() == []
    assert isinstance(watched.counters, Counters)
    assert watched.gather_lengths(7, torch.device("cpu")) == (7,)
