# SPDX-License-Identifier: Apache-2.0
"""Streams and events that do nothing: on the CPU everything is done when the call returns."""

from __future__ import annotations

import time
from typing import Any

import torch

from .registry import replace, unit


class Event:
    """A CUDA event: recorded in host time, complete at once."""

    def __init__(
        self,
        enable_timing: bool = False,
        blocking: bool = False,
        interprocess: bool = False,
        external: bool = False,
    ) -> None:
        self._seconds = 0.0

    def record(self, stream: Any = None) -> None:
        """Note the time."""
        self._seconds = time.perf_counter()

    def elapsed_time(self, end_event: Event) -> float:
        """Milliseconds from this event to `end_event`."""
        return (end_event._seconds - self._seconds) * 1e3

    def query(self) -> bool:
        """True: nothing is ever pending."""
        return True

    def wait(self, stream: Any = None) -> None:
        """Return at once."""

    def synchronize(self) -> None:
        """Return at once."""


class Stream:
    """A CUDA stream with nothing in it."""

    cuda_stream = 0
    stream_id = 0
    device_index = 0
    device_type = 1

    def __init__(self, device: Any = None, priority: int = 0, **kwargs: Any) -> None:
        self.priority = priority
        self.device = torch.device("cuda", 0)

    def wait_stream(self, stream: Any) -> None:
        """Return at once."""

    def wait_event(self, event: Any) -> None:
        """Return at once."""

    def synchronize(self) -> None:
        """Return at once."""

    def query(self) -> bool:
        """True: nothing is ever pending."""
        return True

    def record_event(self, event: Event | None = None) -> Event:
        """Record `event`, or a new one, and return it."""
        event = event or Event()
        event.record(self)
        return event

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """Lowest and highest priority, as an A100 states them."""
        return (0, -1)


DEFAULT = Stream()
_current = [DEFAULT]


class StreamContext:
    """`with torch.cuda.stream(s)`: `s` is the current stream inside."""

    def __init__(self, stream: Stream | None) -> None:
        self.stream = stream

    def __enter__(self) -> Stream | None:
        self._before = _current[0]
        _current[0] = self.stream or _current[0]
        return self.stream

    def __exit__(self, *exception: Any) -> None:
        _current[0] = self._before


@unit
def streams() -> None:
    """Creating a CUDA stream or event needs a driver.

    Serves: training/models/dist_utils.py (DDP is built on a side stream),
    core/distributed/param_and_grad_buffer.py, core/dist_checkpointing/strategies.
    """

    def set_stream(stream: Stream | None) -> None:
        _current[0] = stream or _current[0]

    replace(
        torch.cuda,
        Event=Event,
        Stream=Stream,
        ExternalStream=Stream,
        StreamContext=StreamContext,
        stream=StreamContext,
        current_stream=lambda device=None: _current[0],
        default_stream=lambda device=None: DEFAULT,
        set_stream=set_stream,
    )
    replace(torch.cuda.streams, Event=Event, Stream=Stream)
