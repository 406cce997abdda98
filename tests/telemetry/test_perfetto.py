# SPDX-License-Identifier: Apache-2.0
"""Trace files: valid JSON in the trace event format, times in microseconds, arrows that bind."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_seqpar.errors import SeqParError
from megatron_seqpar.telemetry.perfetto import TraceWriter


def example() -> TraceWriter:
    """Two ranks; rank 1 sends to rank 0 while rank 0 computes."""
    writer = TraceWriter()
    first = writer.process(0, tracks=("compute", "receive"))
    second = writer.process(1, "rank 1 (node 0)")
    first.complete("tile", "compute", 0.001, 0.25, {"q": "0..64", "bytes": 12})
    first.complete("kv", "receive", 0.002, 0.0005)
    second.complete("kv", "send", 0.002, 0.0005)
    second.counter("in flight", 0.002, {"bytes": 12.0})
    writer.flow("kv", (1, "send", 0.002), (0, "receive", 0.0025))
    return writer


def read(path: Path) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return events


def test_times_are_microseconds(tmp_path: Path) -> None:
    example().write(tmp_path / "trace.json")
    (tile,) = (event for event in read(tmp_path / "trace.json") if event["name"] == "tile")
    assert tile["ph"] == "X"
    assert (tile["ts"], tile["dur"]) == (pytest.approx(1e3), pytest.approx(2.5e5))
    assert tile["args"] == {"q": "0..64", "bytes": 12}


def test_ranks_are_processes_and_tracks_are_named_threads(tmp_path: Path) -> None:
    example().write(tmp_path / "trace.json")
    about = [event for event in read(tmp_path / "trace.json") if event["ph"] == "M"]
    names = {
        (event["pid"], event["tid"]): event["args"]["name"]
        for event in about
        if event["name"] in ("process_name", "thread_name")
    }
    assert names == {
        (0, 0): "rank 0",
        (0, 1): "compute",
        (0, 2): "receive",
        (1, 0): "rank 1 (node 0)",
        (1, 1): "send",
    }
    order = [(e["pid"], e["args"]["sort_index"]) for e in about if "sort_index" in e["args"]]
    assert order == [(0, 0), (0, 1), (0, 2), (1, 1), (1, 1)]


def test_an_arrow_has_two_ends_within_bars(tmp_path: Path) -> None:
    example().write(tmp_path / "trace.json")
    events = read(tmp_path / "trace.json")
    start, finish = (event for event in events if event["name"] == "kv" and event["ph"] in "sf")
    assert start["id"] == finish["id"]
    assert (start["ph"], finish["ph"], finish["bp"]) == ("s", "f", "e")
    for end in (start, finish):
        (bar,) = (
            event
            for event in events
            if event["ph"] == "X" and (event["pid"], event["tid"]) == (end["pid"], end["tid"])
            and event["name"] == "kv"
        )  # fmt: skip
        assert bar["ts"] <= end["ts"] <= bar["ts"] + bar["dur"]


def test_compressed_and_with_facts(tmp_path: Path) -> None:
    path = tmp_path / "trace.json.gz"
    example().write(path, {"cluster": "two ranks"})
    content = json.loads(gzip.decompress(path.read_bytes()))
    assert content["otherData"] == {"cluster": "two ranks"}
    assert len(content["traceEvents"]) == len(example().events)


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(SeqParError, match=r"trace .*missing/trace\.json: "):
        example().write(tmp_path / "missing" / "trace.json")
