# SPDX-License-Identifier: Apache-2.0
"""Traces of ranks: written, read, joined on one clock."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_seqpar.errors import SeqParError
from megatron_seqpar.telemetry import trace
from megatron_seqpar.telemetry.attention_bars import attention_bars, transfer_bars
from megatron_seqpar.telemetry.trace import Bar, RankTrace

MS = 1_000_000  # ns
WALL = 1_700_000_000_000_000_000


def event(name: str, begin: int, end: int, **details: Any) -> SimpleNamespace:
    return SimpleNamespace(name=name, begin=begin * MS, end=end * MS, details=details)


def rank_trace(rank: int, machine: str, wall_ms: int, bars: tuple[Bar, ...]) -> RankTrace:
    """A rank whose perf_counter stood at 100 ms x rank when it left the barrier."""
    origin = rank * 100 * MS
    about = {"step": 3}
    return RankTrace(rank, f"rank {rank}", machine, origin, WALL + wall_ms * MS, bars, about)


def bars_of(content: dict[str, Any]) -> dict[tuple[int, str], tuple[float, float]]:
    """(rank, name) -> (begin, duration) in ms."""
    return {
        (e["pid"], e["name"]): (e["ts"] / 1e3, e["dur"] / 1e3)
        for e in content["traceEvents"]
        if e["ph"] == "X"
    }


def track_names(content: dict[str, Any]) -> dict[tuple[int, int], str]:
    return {
        (e["pid"], e["tid"]): e["args"]["name"]
        for e in content["traceEvents"]
        if e["ph"] == "M" and e["name"] == "thread_name"
    }


def test_a_rank_counts_from_the_barrier(tmp_path: Path) -> None:
    bar = Bar("step", "iteration", 103 * MS, 110 * MS, {"iteration": 3})
    trace.write(rank_trace(1, "here", 0, (bar,)), trace.rank_path(tmp_path, 1))
    content = trace.read(tmp_path / "rank-00001.json.gz")
    assert bars_of(content) == {(1, "iteration"): (pytest.approx(3), pytest.approx(7))}
    assert content["otherData"]["step"] == 3


def test_ranks_of_one_machine_keep_their_distance(tmp_path: Path) -> None:
    for rank in (0, 1):
        begin = (100 * rank + 5) * MS
        bar = Bar("step", "iteration", begin, begin + 2 * MS)
        # the second left the barrier 4 ms later
        trace.write(rank_trace(rank, "here", 4 * rank, (bar,)), trace.rank_path(tmp_path, rank))
    found = bars_of(trace.read(trace.merge(tmp_path)))
    assert found[0, "iteration"] == (pytest.approx(5), pytest.approx(2))
    assert found[1, "iteration"] == (pytest.approx(9), pytest.approx(2))


def test_machines_meet_at_the_barrier(tmp_path: Path) -> None:
    """The second machine's wall clock is an hour ahead; its own ranks keep their distance."""
    hour = 3_600_000
    for rank, machine, wall in ((0, "a", 1), (1, "b", hour + 2), (2, "b", hour + 5)):
        bar = Bar("step", "iteration", (100 * rank + 10) * MS, (100 * rank + 20) * MS)
        trace.write(rank_trace(rank, machine, wall, (bar,)), trace.rank_path(tmp_path, rank))
    found = bars_of(trace.read(trace.merge(tmp_path)))
    assert [round(found[rank, "iteration"][0], 3) for rank in range(3)] == [10, 10, 13]


def message_bars(rank: int) -> tuple[Bar, ...]:
    """A tile and a message from rank 0 to rank 1, seen from `rank`."""
    base = 100 * rank
    moved = event("send" if rank == 0 else "receive", base + 1, base + 4 + rank, peer=1 - rank,
                  number=0, bytes=640, payload="kv", tokens="[0,64)", queued_us=0)  # fmt: skip
    tile = SimpleNamespace(kind="causal", q="[0,64)", kv="[0,64)", heads="[0,2)", pairs=2080)
    computed = event("tile", base + 1, base + 9, tile=tile, direction="forward", layer=2, call=7)
    waited = event("wait", base + 9, base + 10, transfers=((), (1,)), direction="forward", call=7)
    return (
        *attention_bars([computed, waited]),
        *transfer_bars([moved], rank, lambda group_rank: 4 + group_rank, "axis"),
    )


def test_a_message_is_an_arrow_from_its_send_to_its_receive(tmp_path: Path) -> None:
    for rank in (0, 1):
        trace.write(
            rank_trace(rank, "here", 0, message_bars(rank)), trace.rank_path(tmp_path, rank)
        )
    content = trace.read(trace.merge(tmp_path))
    names = track_names(content)
    start, finish = (e for e in content["traceEvents"] if e["ph"] in "sf")
    assert (start["ph"], names[start["pid"], start["tid"]]) == ("s", "send to rank 5")
    assert (finish["ph"], names[finish["pid"], finish["tid"]]) == ("f", "receive from rank 4")
    assert start["id"] == finish["id"]
    assert (start["ts"], finish["ts"]) == (pytest.approx(2500), pytest.approx(3000))
    bars = [e for e in content["traceEvents"] if e["ph"] == "X"]
    assert {names[e["pid"], e["tid"]] for e in bars} == set(names.values())


def test_tiles_lie_in_the_bar_of_their_call() -> None:
    bars = {bar.name: bar for bar in message_bars(0)}
    call = bars["attention, forward, layer 2"]
    assert (call.begin, call.end) == (1 * MS, 10 * MS)
    assert bars["causal tile"].track == bars["wait"].track == call.track == "attention"
    assert bars["causal tile"].facts["pairs"] == 2080
    assert bars["wait"].facts["receives"] == 1
    assert bars["kv [0,64)"].facts["bytes"] == 640


def test_repeated_attention_is_named_so() -> None:
    again = {"recompute": True, "call": 1}
    bars = attention_bars([event("tile", 1, 2, direction="forward", **again)])
    assert {bar.facts["direction"] for bar in bars} == {"recompute"}
    bars = attention_bars([event("tile", 3, 4, direction="backward", **again)])
    assert {bar.facts["direction"] for bar in bars} == {"backward"}  # of what was repeated


def test_both_passes_of_a_call_have_bars_of_their_own() -> None:
    events = [
        event("tile", 1, 2, direction="forward", call=1),
        event("tile", 8, 9, direction="backward", call=1),
    ]
    calls = [bar for bar in attention_bars(events) if bar.facts["kind"] == "call"]
    assert [(bar.begin // MS, bar.end // MS) for bar in calls] == [(1, 2), (8, 9)]


def test_summary_adds_up(tmp_path: Path) -> None:
    path = trace.rank_path(tmp_path, 0)
    trace.write(rank_trace(0, "here", 0, message_bars(0)), path)
    (mine,) = trace.summary(path).values()
    assert mine["tile"] == pytest.approx(0.008)
    assert mine["wait"] == pytest.approx(0.001)
    assert mine["bytes"] == 640


def test_what_is_not_a_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SeqParError, match="no files rank-"):
        trace.merge(tmp_path)
    (tmp_path / "rank-00000.json.gz").write_bytes(b"half a fi")
    with pytest.raises(SeqParError, match=r"rank-00000"):
        trace.merge(tmp_path)
    (tmp_path / "other.json").write_text("[1]")
    with pytest.raises(SeqParError, match="not a trace"):
        trace.read(tmp_path / "other.json")
