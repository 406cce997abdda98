# SPDX-License-Identifier: Apache-2.0
"""Bars of a trace from what a recorder and a watched transport kept of attention.

Tracks: "step" (the iteration and its micro-batches), "attention" (calls, and in them tiles, waits,
posts and merges), and one for each link to or from a peer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from .trace import Bar

STEP = "step"
ATTENTION = "attention"


class TimedEvent(Protocol):
    """What `attention.recorder.Event` is."""

    @property
    def name(self) -> str: ...

    @property
    def begin(self) -> int: ...

    @property
    def end(self) -> int: ...

    @property
    def details(self) -> Mapping[str, Any]: ...


def attention_bars(events: Iterable[TimedEvent]) -> list[Bar]:
    """Tiles, waits, posts and merges, and around those of one call a bar for the call.

    Details used: `tile`, `transfers`, `step`, `direction`; and of the labels `call` (which spans
    belong together), `layer`, `microbatch`, `recompute`.
    """
    bars: list[Bar] = []
    calls: dict[tuple[Any, Any], tuple[dict[str, Any], list[TimedEvent]]] = {}
    for event in events:
        labels = {k: v for k, v in event.details.items() if k not in ("tile", "transfers", "call")}
        _name_pass(labels)
        facts = {"kind": event.name, **labels}
        name, tile = event.name, event.details.get("tile")
        if tile is not None:
            name = f"{tile.kind} tile"
            facts |= {"q": str(tile.q), "kv": str(tile.kv), "heads": str(tile.heads)}
            facts["pairs"] = tile.pairs
        if "transfers" in event.details:
            sends, receives = event.details["transfers"]
            facts |= {"sends": len(sends), "receives": len(receives)}
        bars.append(Bar(ATTENTION, name, event.begin, event.end, facts))
        call = event.details.get("call")
        if call is not None:
            calls.setdefault((call, labels.get("direction")), (labels, []))[1].append(event)
    return bars + [_call(labels, inside) for labels, inside in calls.values()]


def _name_pass(facts: dict[str, Any]) -> None:
    """A forward pass that is a repetition is named so."""
    if facts.pop("recompute", False) and facts.get("direction") == "forward":
        facts["direction"] = "recompute"


def _call(labels: Mapping[str, Any], inside: list[TimedEvent]) -> Bar:
    facts = {k: v for k, v in labels.items() if k != "step"}
    parts = ["attention", str(labels.get("direction", ""))]
    parts += [f"{word} {labels[key]}" for key, word in _SHOWN.items() if key in labels]
    begin, end = min(e.begin for e in inside), max(e.end for e in inside)
    return Bar(ATTENTION, ", ".join(parts), begin, end, {"kind": "call", **facts})


_SHOWN = {"layer": "layer", "microbatch": "micro-batch"}


def transfer_bars(
    events: Iterable[TimedEvent], me: int, global_rank: Callable[[int], int], group: str
) -> list[Bar]:
    """Sends and receives, each on the track of its link.

    me: this rank's number in the group. global_rank: of a group rank. group: the group's name, the
        same on all its ranks.
    """
    bars = []
    for event in events:
        facts = {"kind": event.name, **event.details}
        peer, number = facts.pop("peer"), facts.pop("number")
        there = global_rank(peer)
        sends = event.name == "send"
        src, dst = (me, peer) if sends else (peer, me)
        _name_pass(facts)
        facts.pop("call", None)
        bars.append(
            Bar(
                track=f"send to rank {there}" if sends else f"receive from rank {there}",
                name=f"{facts['payload']} {facts.get('tokens', '')}".strip(),
                begin=event.begin,
                end=event.end,
                facts={**facts, "peer": there},
                message=f"{group} {global_rank(src)}>{global_rank(dst)} {number}",
                sends=sends,
            )
        )
    return bars
