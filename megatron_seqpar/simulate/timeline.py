# SPDX-License-Identifier: Apache-2.0
"""What happens when on every rank: the outcome of simulating one pass of a schedule."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from .cluster import Direction


class EventKind(StrEnum):
    """What a rank, or one of its ports, does."""

    POST = "post"  # posts the transfers of a step
    COMPUTE = "compute"  # a tile's kernel
    MERGE = "merge"  # adds a partial result, its own or one that arrived
    WAIT = "wait"  # for the transfers of the step
    SEND = "send"  # a port, while a message leaves
    RECEIVE = "receive"  # a port, while a message comes in


OF_THE_RANK = (EventKind.POST, EventKind.COMPUTE, EventKind.MERGE, EventKind.WAIT)


class Event(NamedTuple):
    """Something that took time.

    Attributes:
        kind, rank, step: what, on which rank, at which step of its plan.
        start, stop: seconds from the start of the pass. Of a send or receive: while its ports are
            taken; it has arrived `latency` after `stop`.
        subject: the tile or the transfer; None for posts and waits.
        size: bytes, of a send or receive.
        within_node: of a send or receive: between ranks of one node.
        latency: seconds, of a send or receive.
    """

    kind: EventKind
    rank: int
    step: int
    start: float
    stop: float
    subject: Any = None
    size: int = 0
    within_node: bool = True
    latency: float = 0.0

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.stop - self.start

    @property
    def label(self) -> str:
        """In a few words."""
        subject = self.subject
        if subject is None:
            return f"{self.kind} {self.step}"
        if self.kind in (EventKind.SEND, EventKind.RECEIVE):
            peer = f"to {subject.dst}" if self.kind is EventKind.SEND else f"from {subject.src}"
            return f"{subject.payload} {_range(subject.span)} {peer}"
        if hasattr(subject, "payload"):
            return f"{self.kind} {subject.payload} {_range(subject.span)}"
        verb = "tile" if self.kind is EventKind.COMPUTE else str(self.kind)
        return f"{verb} q{_range(subject.q)} kv{_range(subject.kv)}"


def _range(span: Any) -> str:
    return f"[{span.start},{span.stop})"


@dataclass(frozen=True)
class Timeline:
    """One pass of a schedule on a cluster; times in seconds, lists by rank.

    Attributes:
        schedule, direction, cluster, dtype, batch, overlap: what was simulated.
        makespan: until the last rank is done.
        finish: until each rank is done.
        compute, merge, post, wait: what each rank spent its time on, up to its finish.
        exposed: the part of `wait` in which a transfer of the rank was under way (both ends had
            posted it); the rest of `wait` is for peers that were not there yet.
        bytes_sent, messages_sent: by each rank.
        events: of each rank, in order of their start; empty when not asked for.
    """

    schedule: str
    direction: Direction
    cluster: str
    dtype: str
    batch: int
    overlap: bool
    makespan: float
    finish: tuple[float, ...]
    compute: tuple[float, ...]
    merge: tuple[float, ...]
    post: tuple[float, ...]
    wait: tuple[float, ...]
    exposed: tuple[float, ...]
    bytes_sent: tuple[int, ...]
    messages_sent: tuple[int, ...]
    events: tuple[tuple[Event, ...], ...]

    @property
    def size(self) -> int:
        """Ranks."""
        return len(self.finish)

    @property
    def busy(self) -> tuple[float, ...]:
        """Seconds that each rank computed, merged or posted."""
        parts = zip(self.compute, self.merge, self.post, strict=True)
        return tuple(sum(part) for part in parts)

    @property
    def after_finish(self) -> tuple[float, ...]:
        """Seconds that each rank is done before the last one."""
        return tuple(self.makespan - finish for finish in self.finish)

    @property
    def wait_share(self) -> float:
        """Share of all rank-time spent waiting for transfers."""
        return self._share(sum(self.wait))

    @property
    def idle_fraction(self) -> float:
        """Share of all rank-time in which no tile was computed."""
        return 1.0 - self._share(sum(self.compute)) if self.makespan else 0.0

    def _share(self, seconds: float) -> float:
        return seconds / (self.size * self.makespan) if self.makespan else 0.0
