# SPDX-License-Identifier: Apache-2.0
"""CUDA streams played on the CPU: work is queued at once and done later, in any order allowed.

`Device.patched()` puts `torch.cuda`'s streams and events in place of the real ones. Threads queue
work on them; then `Device.finish(seed)` does one piece after another from a stream taken at random,
as a GPU might, and every order that the events allow comes up for some seed.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

DEVICE = torch.device("cuda", 0)


class Event:
    """Happens when a stream gets to where it was recorded."""

    def __init__(self) -> None:
        self.happened = False


class Stream:
    """A queue of (event to wait for, or None; what to do)."""

    def __init__(self, owner: Device) -> None:
        self.owner, self.device = owner, DEVICE
        self.queue: deque[tuple[Event | None, Callable[[], None]]] = deque()

    def do(self, what: Callable[[], None]) -> None:
        self.queue.append((None, what))

    def record_event(self) -> Event:
        event = Event()
        self.do(lambda: setattr(event, "happened", True))
        return event

    def wait_event(self, event: Event) -> None:
        self.queue.append((event, lambda: None))

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())


class Tensor:
    """One number on the device, read and written when the stream gets there."""

    dtype, shape, nbytes, device = torch.float32, torch.Size([1]), 4, DEVICE

    def __init__(self, owner: Device) -> None:
        self.owner = owner
        self.value = float("nan")
        self.recorded: list[Stream] = []

    def fill_(self, value: float) -> None:
        self.owner.current().do(lambda: setattr(self, "value", value))

    def copy_(self, other: Tensor, non_blocking: bool = False) -> None:
        self.owner.current().do(lambda: setattr(self, "value", other.value))

    def read(self, into: list[float]) -> None:
        self.owner.current().do(lambda: into.append(self.value))

    def record_stream(self, stream: Stream) -> None:
        self.recorded.append(stream)


class Device:
    """All streams of one played device."""

    def __init__(self) -> None:
        self.streams: list[Stream] = []
        self.default = self.new_stream()
        self._local = threading.local()

    def new_stream(self, device: object = None) -> Stream:
        stream = Stream(self)
        self.streams.append(stream)
        return stream

    def current(self, device: object = None) -> Stream:
        return getattr(self._local, "stream", self.default)

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before = self.current()
        self._local.stream = stream
        yield
        self._local.stream = before

    def finish(self, seed: int) -> None:
        """Do all that is queued; fails when streams wait for one another in a circle."""
        order = random.Random(seed)
        while any(stream.queue for stream in self.streams):
            ready = [
                s
                for s in self.streams
                if s.queue and (s.queue[0][0] is None or s.queue[0][0].happened)
            ]
            assert ready, "streams wait for one another"
            # runs of work on one stream: it is far ahead of the others or far behind
            stream = order.choice(ready)
            for _ in range(order.randint(1, 12)):
                if not stream.queue or not (
                    stream.queue[0][0] is None or stream.queue[0][0].happened
                ):
                    break
                stream.queue.popleft()[1]()

    @contextmanager
    def patched(self) -> Iterator[None]:
        """`torch.cuda` with this device's streams."""
        with pytest.MonkeyPatch.context() as patch:
            values: dict[str, Any] = {
                "Stream": self.new_stream,
                "current_stream": self.current,
                "stream": self.on,
                "_sleep": lambda cycles: None,
            }
            for name, value in values.items():
                patch.setattr(torch.cuda, name, value)
            yield
