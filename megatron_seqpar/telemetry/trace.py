# SPDX-License-Identifier: Apache-2.0
"""Traces of one training step: a file a rank, and one of all ranks.

Note: one clock for all ranks
-----------------------------
Every rank writes times since it left a barrier just before the step, and beside them the wall-clock
time of that moment. Ranks of one machine share the wall clock, so when traces are joined they keep
their true distance. Machines' wall clocks differ by more than a tile takes, so each machine's first
rank out of the barrier is taken to have left it together with the first of every other machine: off
by the latency of a barrier.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import SeqParError
from .perfetto import TraceWriter

_SUFFIX = ".json.gz"


@dataclass(frozen=True, slots=True)
class Bar:
    """Something that took time on a rank.

    Attributes:
        track: bars of one track nest or follow one another.
        name: its text.
        begin, end: ns of `time.perf_counter_ns`.
        facts: shown when it is chosen; what JSON can hold.
        message: the same text at both ends of a message; joined traces draw an arrow.
        sends: whether this end of the message is where the arrow begins.
    """

    track: str
    name: str
    begin: int
    end: int
    facts: Mapping[str, Any] = field(default_factory=dict)
    message: str | None = None
    sends: bool = False


@dataclass(frozen=True)
class RankTrace:
    """What one rank saw of a step.

    Attributes:
        rank: global rank. label: its name in the viewer. machine: equal where the wall clock is.
        origin: ns of `time.perf_counter_ns` when it left the barrier, origin_wall: ns of
            `time.time_ns` at that moment.
        bars: in any order.
        about: facts of the run.
    """

    rank: int
    label: str
    machine: str
    origin: int
    origin_wall: int
    bars: tuple[Bar, ...]
    about: Mapping[str, Any] = field(default_factory=dict)


def rank_path(folder: Path, rank: int) -> Path:
    """The file of one rank, in the folder of one step."""
    return folder / f"rank-{rank:05d}{_SUFFIX}"


def merged_path(folder: Path) -> Path:
    """The file of all ranks, in the folder of one step."""
    return folder / f"all-ranks{_SUFFIX}"


def clear(folder: Path) -> None:
    """Delete the trace files in the folder of one step, if any."""
    for path in (*folder.glob(f"rank-*{_SUFFIX}"), merged_path(folder)):
        path.unlink(missing_ok=True)


def write(trace: RankTrace, path: Path) -> None:
    """Write the trace of one rank; `SeqParError` when that fails."""
    writer = TraceWriter()
    process = writer.process(trace.rank, trace.label, _tracks(trace.bars))
    ends = []
    for bar in sorted(trace.bars, key=lambda bar: (bar.begin, -bar.end)):
        start = (bar.begin - trace.origin) / 1e9
        process.complete(bar.name, bar.track, start, (bar.end - bar.begin) / 1e9, bar.facts)
        if bar.message is not None:
            # the middle of a bar is in no other one of its track
            middle = start + (bar.end - bar.begin) / 2e9
            ends.append([bar.message, bar.sends, bar.track, middle])
    about = {
        **trace.about,
        "rank": trace.rank,
        "label": trace.label,
        "machine": trace.machine,
        "origin_wall_ns": trace.origin_wall,
        "tracks": _tracks(trace.bars),
        "messages": ends,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    writer.write(path, about)


def _tracks(bars: Iterable[Bar]) -> tuple[str, ...]:
    """Tracks in the order in which they should be seen: what a rank does, then its links."""
    found = dict.fromkeys(bar.track for bar in bars)
    return tuple(sorted(found, key=lambda track: (track.startswith(("send", "receive")), track)))


def read(path: Path) -> dict[str, Any]:
    """The content of a trace file; `SeqParError` when it is none."""
    try:
        data = path.read_bytes()
        content = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
    except (OSError, ValueError, EOFError) as failure:
        raise SeqParError(f"trace {path}: {failure}") from None
    if not isinstance(content, dict) or "traceEvents" not in content:
        raise SeqParError(f"trace {path}: not a trace of a training step")
    return content


def merge(folder: Path) -> Path:
    """Join the files of all ranks in the folder of one step; the path of the result.

    Raises `SeqParError` when there are none, or when one cannot be read.
    """
    paths = sorted(folder.glob(f"rank-*{_SUFFIX}"))
    if not paths:
        raise SeqParError(f"trace {folder}: no files rank-*{_SUFFIX} there")
    contents = [read(path) for path in paths]
    zero: dict[str, int] = {}
    for content in contents:
        about = content["otherData"]
        machine, wall = about["machine"], about["origin_wall_ns"]
        zero[machine] = min(wall, zero.get(machine, wall))
    writer = TraceWriter()
    begins: dict[str, tuple[int, str, float]] = {}
    ends: dict[str, tuple[int, str, float]] = {}
    for content in contents:
        about = content["otherData"]
        rank = about["rank"]
        shift = (about["origin_wall_ns"] - zero[about["machine"]]) / 1e9
        writer.process(rank, about["label"], tuple(about["tracks"]))
        for event in content["traceEvents"]:
            if event["ph"] != "M":
                event["ts"] += shift * 1e6
                writer.events.append(event)
        for message, sends, track, middle in about["messages"]:
            (begins if sends else ends)[message] = rank, track, middle + shift
    for message, source in begins.items():
        if message in ends:
            writer.flow("transfer", source, ends[message])
    shared = {k: v for k, v in contents[0]["otherData"].items() if k in ("step", "versions")}
    writer.write(merged_path(folder), {**shared, "ranks": len(contents), "machines": len(zero)})
    return merged_path(folder)


def summary(path: Path) -> dict[int, dict[str, float]]:
    """By rank, from a trace file: seconds by name of the bars on the attention track, bytes sent.

    Keys are "tile", "wait", "post", "merge" (seconds), "bytes" and "step" (seconds of the step).
    """
    totals: dict[int, dict[str, float]] = {}
    for event in read(path)["traceEvents"]:
        if event["ph"] != "X":
            continue
        mine = totals.setdefault(event["pid"], {})
        facts = event.get("args", {})
        kind = facts.get("kind")
        if kind is not None:
            mine[kind] = mine.get(kind, 0.0) + event["dur"] / 1e6
        if kind == "send":
            mine["bytes"] = mine.get("bytes", 0.0) + facts["bytes"]
    return totals
