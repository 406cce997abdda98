# SPDX-License-Identifier: Apache-2.0
"""Traces that https://ui.perfetto.dev and chrome://tracing open: one process a rank, named tracks.

Both the simulator and the traces of real runs write through this module, so that the two can be
laid side by side. The form is Chrome's JSON trace event format: times there are microseconds, here
seconds.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import SeqParError

_MICROSECONDS = 1e6


class Process:
    """One rank of a trace; `TraceWriter.process` makes it.

    Tracks appear in the order of `tracks`, then in the order of their first use.
    """

    def __init__(self, writer: TraceWriter, rank: int, label: str, tracks: tuple[str, ...]) -> None:
        self._writer, self.rank = writer, rank
        self._tracks: dict[str, int] = {}
        writer._about(rank, 0, "process_name", name=label)
        writer._about(rank, 0, "process_sort_index", sort_index=rank)
        for track in tracks:
            self.track(track)

    def track(self, name: str) -> int:
        """The number of a track, which is made when first asked for."""
        known = self._tracks.get(name)
        if known is None:
            known = self._tracks[name] = len(self._tracks) + 1
            self._writer._about(self.rank, known, "thread_name", name=name)
            self._writer._about(self.rank, known, "thread_sort_index", sort_index=known)
        return known

    def complete(
        self,
        name: str,
        track: str,
        start_s: float,
        duration_s: float,
        args: Mapping[str, Any] | None = None,
    ) -> None:
        """A bar on a track.

        Args:
            name: its text; bars of one name share a colour.
            track: bars of one track may nest but must not overlap in part.
            start_s, duration_s: seconds.
            args: shown when the bar is chosen; what JSON can hold.
        """
        event = {
            "ph": "X",
            "name": name,
            "pid": self.rank,
            "tid": self.track(track),
            "ts": start_s * _MICROSECONDS,
            "dur": max(duration_s, 0.0) * _MICROSECONDS,
        }
        if args:
            event["args"] = dict(args)
        self._writer.events.append(event)

    def counter(self, name: str, time_s: float, values: Mapping[str, float]) -> None:
        """Values of a curve that is drawn below the tracks (bytes in flight, memory)."""
        self._writer.events.append(
            {
                "ph": "C",
                "name": name,
                "pid": self.rank,
                "ts": time_s * _MICROSECONDS,
                "args": dict(values),
            }
        )


class TraceWriter:
    """Collects the events of all ranks and writes them in one file.

    Attributes:
        events: what was recorded, in the trace event format. Traces of ranks that ran in processes
            of their own are joined by extending one writer's events with the others'.
    """

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self._processes: dict[int, Process] = {}
        self._flows = 0

    def process(self, rank: int, label: str | None = None, tracks: tuple[str, ...] = ()) -> Process:
        """The process of a rank; `label` and `tracks` count in its first call."""
        if rank not in self._processes:
            self._processes[rank] = Process(self, rank, label or f"rank {rank}", tracks)
        return self._processes[rank]

    def flow(
        self, name: str, source: tuple[int, str, float], target: tuple[int, str, float]
    ) -> None:
        """An arrow between two bars, each named by (rank, track, a time in seconds within it)."""
        self._flows += 1
        for phase, (rank, track, time_s) in (("s", source), ("f", target)):
            event = {
                "ph": phase,
                "name": name,
                "cat": "flow",
                "id": self._flows,
                "pid": rank,
                "tid": self.process(rank).track(track),
                "ts": time_s * _MICROSECONDS,
            }
            if phase == "f":
                event["bp"] = "e"  # ends in the bar around it, not in the next one
            self.events.append(event)

    def write(self, path: Path, about: Mapping[str, Any] | None = None) -> None:
        """Write the trace; `SeqParError` when that fails.

        Args:
            path: gzip-compressed when it ends in .gz; both viewers open that as well.
            about: facts of the whole trace (versions, the command), kept under "otherData".
        """
        content: dict[str, Any] = {"traceEvents": self.events, "displayTimeUnit": "ms"}
        if about:
            content["otherData"] = dict(about)
        text = json.dumps(content, separators=(",", ":"), allow_nan=False)
        try:
            if path.suffix == ".gz":
                path.write_bytes(gzip.compress(text.encode(), mtime=0))
            else:
                path.write_text(text, encoding="utf-8")
        except OSError as failure:
            raise SeqParError(f"trace {path}: {failure}") from None

    def _about(self, rank: int, track: int, kind: str, **args: Any) -> None:
        self.events.append({"ph": "M", "name": kind, "pid": rank, "tid": track, "args": args})
