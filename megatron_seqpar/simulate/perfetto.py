# SPDX-License-Identifier: Apache-2.0
"""A simulated timeline as a Perfetto trace: a process a rank, tracks for it and its ports."""

from __future__ import annotations

from typing import Any

from ..telemetry.perfetto import TraceWriter
from .timeline import Event, EventKind, Timeline

_TRACKS = ("compute", "wait", "send", "receive", "send to other nodes", "receive from other nodes")


def trace_of(*timelines: Timeline) -> TraceWriter:
    """Timelines (a forward and its backward, say) one after another in one trace.

    Bars carry the step, the ranges and heads of their tile, or the bytes and the peer of their
    transfer; arrows go from each send to its receive.
    """
    writer, offset = TraceWriter(), 0.0
    for timeline in timelines:
        _add(writer, timeline, offset)
        offset += timeline.makespan
    return writer


def _add(writer: TraceWriter, timeline: Timeline, offset: float) -> None:
    sends: dict[tuple[Any, float], Event] = {}
    receives = []
    for rank, events in enumerate(timeline.events):
        process = writer.process(rank, tracks=_TRACKS[:4])
        for event in events:
            args = {"direction": timeline.direction, "step": event.step, **_details(event)}
            start = offset + event.start
            process.complete(event.label, track_of(event), start, event.seconds, args)
            if event.kind is EventKind.SEND:
                sends[event.subject, event.start] = event
            elif event.kind is EventKind.RECEIVE:
                receives.append(event)
    for receive in receives:
        send = sends[receive.subject, receive.start]
        writer.flow(
            str(receive.subject.payload),
            (send.rank, track_of(send), offset + send.start),
            (receive.rank, track_of(receive), offset + receive.start),
        )


def track_of(event: Event) -> str:
    """The track an event is drawn on: no two events of a track overlap."""
    if event.kind is EventKind.WAIT:
        return "wait"
    if event.kind is EventKind.SEND:
        return "send" if event.within_node else "send to other nodes"
    if event.kind is EventKind.RECEIVE:
        return "receive" if event.within_node else "receive from other nodes"
    return "compute"


def _details(event: Event) -> dict[str, Any]:
    subject = event.subject
    if subject is None:
        return {}
    heads = [subject.heads.start, subject.heads.stop]
    if hasattr(subject, "payload"):
        found = {
            "payload": str(subject.payload),
            "tokens": [subject.span.start, subject.span.stop],
            "heads": heads,
            "src": subject.src,
            "dst": subject.dst,
        }
        if event.size:
            found["bytes"] = event.size
            found["latency_us"] = event.latency * 1e6
        return found
    return {
        "q": [subject.q.start, subject.q.stop],
        "kv": [subject.kv.start, subject.kv.stop],
        "heads": heads,
        "pairs": subject.pairs,
    }
