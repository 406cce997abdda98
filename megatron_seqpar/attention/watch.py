# SPDX-License-Identifier: Apache-2.0
"""When each transfer really ended: a transport that watches another one.

For traces of single steps; ordinary steps run on the bare transport.

Note: how the end of a transfer is seen
---------------------------------------
Gloo gives one work a message, whose only sign of completion is that its `wait` returns, once. A
thread a link (peer and direction) waits for the works of that link in their order, notes the time
and lets the executor's own wait return. A send ends when its bytes are handed to the socket, a
receive when they are in its buffer: the receives tell the time of the link.

NCCL gives one work for all messages of a step, which any number of streams may wait for. A stream
of the watcher's own does, and is marked behind it: all transfers of the step share that end.

Any other transport is taken to be done when the executor has waited.

The messages of one peer and direction cross their link one after the other, so a transfer is shown
from its post, or from the end of the one before it, to its end.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .counters import Counters
from .ir import PARTS, Transfer
from .recorder import Event, TimedRecorder
from .transport import Message, Pending, Transport

_PATIENCE = 1.0

Link = tuple[int, bool]
"""Peer (group rank), and whether this rank sends."""


@dataclass(slots=True)
class _Moved:
    """One transfer under way; marks are the recorder's clock's."""

    link: Link
    number: int  # of the transfers of its link since the watch began: the same at both ends
    bytes: int
    posted: Any
    details: dict[str, Any]
    done: Any = None


class WatchedTransport:
    """See `Transport`; notes posts and ends of all transfers of `inner`.

    What is known of a transfer (layer, step, payload) comes from the span that the recorder has
    open when it is posted. `close` ends the watching threads.
    """

    def __init__(self, inner: Transport, recorder: TimedRecorder) -> None:
        self.inner, self.recorder = inner, recorder
        self.rank, self.size = inner.rank, inner.size
        self.counters: Counters = inner.counters
        self._moved: list[_Moved] = []
        self._numbers: dict[Link, int] = {}
        self._watchers: dict[Link, _Watcher] = {}
        self._stream: torch.cuda.Stream | None = None

    def prepare(self, device: torch.device) -> None:
        self.inner.prepare(device)

    def gather_lengths(self, local: int, device: torch.device) -> tuple[int, ...]:
        return self.inner.gather_lengths(local, device)

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        posted = self.recorder.clock.mark()
        pending = self.inner.exchange(sends, receives)
        if not sends and not receives:
            return pending
        details = self.recorder.open[-1].details if self.recorder.open else {}
        planned = details.get("transfers", ((), ()))
        labels = {k: v for k, v in details.items() if k != "transfers"}
        moves: list[_Moved] = []  # by message
        for sent, messages, transfers in ((True, sends, planned[0]), (False, receives, planned[1])):
            for part, transfer in _by_transfer(messages, transfers):
                link = part[0].peer, sent
                number = self._numbers.get(link, 0)
                self._numbers[link] = number + 1
                size = sum(message.tensor.nbytes for message in part)
                facts = {"payload": part[0].kind, **labels}
                if transfer is not None:
                    facts |= {"tokens": str(transfer.span), "heads": str(transfer.heads)}
                moved = _Moved(link, number, size, posted, facts)
                self._moved.append(moved)
                moves += [moved] * len(part)
        works = getattr(pending, "works", [])
        on_gpu = (sends or receives)[0].tensor.is_cuda
        if on_gpu and not getattr(self.inner, "moves_host_memory_only", False):
            self._mark_behind(works, moves)
        elif not on_gpu and len(works) == len(moves):
            pending.works = [  # type: ignore[attr-defined]
                self._watch(work, moved) for work, moved in zip(works, moves, strict=True)
            ]
            return pending
        return _UntilWaited(pending, [m for m in moves if m.done is None], self.recorder)

    def _watch(self, work: Any, moved: _Moved) -> _Watched:
        watcher = self._watchers.get(moved.link)
        if watcher is None:
            watcher = self._watchers[moved.link] = _Watcher(self.recorder)
        watched = _Watched(work, moved)
        watcher.queue.put(watched)
        return watched

    def _mark_behind(self, works: Sequence[Any], moves: Sequence[_Moved]) -> None:
        if not works:
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        with torch.cuda.stream(self._stream):
            for work in works:
                work.wait()
            done = self.recorder.clock.mark()
        for moved in moves:
            moved.done = done

    def close(self) -> None:
        """End the watching threads; those with transfers under way end when these do."""
        for watcher in self._watchers.values():
            watcher.queue.put(None)
        for watcher in self._watchers.values():
            watcher.thread.join(_PATIENCE)  # not for ever: the step may have failed
        self._watchers.clear()

    def events(self) -> list[Event]:
        """The transfers that ended, "send" or "receive", by link; on a GPU synchronise first."""
        at = self.recorder.clock.at
        free: dict[Link, int] = {}
        events = []
        for moved in self._moved:
            if moved.done is None:
                continue
            posted, end = at(moved.posted), at(moved.done)
            begin = min(max(posted, free.get(moved.link, posted)), end)
            free[moved.link] = end
            peer, sent = moved.link
            details = {
                "peer": peer,
                "number": moved.number,
                "bytes": moved.bytes,
                "queued_us": (begin - posted) // 1000,
                **moved.details,
            }
            events.append(Event("send" if sent else "receive", begin, end, details))
        return events


def _by_transfer(
    messages: Sequence[Message], transfers: Sequence[Transfer]
) -> Iterator[tuple[list[Message], Transfer | None]]:
    """The messages of each transfer; each message by itself where the plan is not known."""
    if sum(PARTS[transfer.payload] for transfer in transfers) != len(messages):
        yield from (([message], None) for message in messages)
        return
    at = 0
    for transfer in transfers:
        parts = PARTS[transfer.payload]
        yield list(messages[at : at + parts]), transfer
        at += parts


class _Watched:
    """A work that a watcher waits for; its own `wait` returns when the watcher's has."""

    def __init__(self, work: Any, moved: _Moved) -> None:
        self.work, self.moved = work, moved
        self.over = threading.Event()
        self.failure: BaseException | None = None

    def wait(self) -> None:
        self.over.wait()
        if self.failure is not None:
            raise self.failure


class _Watcher:
    """The thread of one link."""

    def __init__(self, recorder: TimedRecorder) -> None:
        self.queue: queue.SimpleQueue[_Watched | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._run, args=(recorder,), daemon=True)
        self.thread.start()

    def _run(self, recorder: TimedRecorder) -> None:
        while (watched := self.queue.get()) is not None:
            try:
                watched.work.wait()
                watched.moved.done = recorder.clock.mark()
            except BaseException as failure:  # raised where the executor waits
                watched.failure = failure
            watched.over.set()


class _UntilWaited:
    """Transfers whose end nobody tells: over when waited for."""

    def __init__(self, pending: Pending, moves: list[_Moved], recorder: TimedRecorder) -> None:
        self.pending, self.moves, self.recorder = pending, moves, recorder

    def wait(self) -> None:
        self.pending.wait()
        if self.moves:
            done = self.recorder.clock.mark()
            for moved in self.moves:
                moved.done = done
