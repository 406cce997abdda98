# SPDX-License-Identifier: Apache-2.0
"""Who is told what the executor does and when.

The executor opens a span around everything it does: "post" (transfers of a step), "tile", "wait",
"merge". A recorder decides what becomes of it: nothing (`SILENT`), sums of seconds (`Meter`, always
affordable), or every single event (`TimedRecorder`, for a trace of one training step).

Note: time on a GPU
-------------------
The CPU only enqueues work there, so a span is marked by two CUDA events on the current stream, and
nothing is synchronised until the events are read. A "wait" span is then the time that the stream
stood still for the transfers, which is what the word means on a CPU as well.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol


class Recorder(Protocol):
    """Told what the executor does."""

    def span(self, name: str, **details: Any) -> AbstractContextManager[Any]:
        """A context that the executor is in while it does `name`.

        Args:
            name: "post", "tile", "wait" or "merge".
            details: of all: `step` (index), `direction`; of "tile": `tile`; of "post" and "wait":
                `transfers`, the step's (sends, receives).
        """


_NOTHING: AbstractContextManager[Any] = nullcontext()


class Silent:
    """Records nothing."""

    def span(self, name: str, **details: Any) -> AbstractContextManager[Any]:
        return _NOTHING


SILENT = Silent()


class Clock(Protocol):
    """Marks moments now, and tells later when they were."""

    def mark(self) -> Any:
        """This moment; cheap, never waits."""

    def passed(self, mark: Any) -> bool:
        """Whether the moment has come (on a GPU it comes when the stream gets there)."""

    def at(self, mark: Any) -> int:
        """When it was, in ns of `time.perf_counter_ns`; the moment must have passed."""


class HostClock:
    """The CPU's clock: work is done when the call returns."""

    def mark(self) -> int:
        return time.perf_counter_ns()

    def passed(self, mark: int) -> bool:
        return True

    def at(self, mark: int) -> int:
        return mark


class CudaClock:
    """Moments of the current CUDA stream, on the time scale of the CPU.

    Making one waits for the device, to see both clocks at one moment; do it between steps.
    """

    def __init__(self) -> None:
        import torch

        self._new_event: Callable[..., Any] = torch.cuda.Event
        self._origin = self.mark()
        self._origin.synchronize()
        self._origin_ns = time.perf_counter_ns()

    def mark(self) -> Any:
        event = self._new_event(enable_timing=True)
        event.record()
        return event

    def passed(self, mark: Any) -> bool:
        return bool(mark.query())

    def at(self, mark: Any) -> int:
        # CUDA gives milliseconds
        return self._origin_ns + round(float(self._origin.elapsed_time(mark)) * 1e6)


def clock_of(device_type: str) -> Clock:
    """The clock of a device: "cuda" or "cpu"."""
    return CudaClock() if device_type == "cuda" else HostClock()


class _Span:
    __slots__ = ("begin", "details", "name", "recorder")

    def __init__(self, recorder: _Spans, name: str, details: dict[str, Any]) -> None:
        self.recorder, self.name, self.details = recorder, name, details

    def __enter__(self) -> None:
        self.recorder.open.append(self)
        self.begin = self.recorder.clock.mark()

    def __exit__(self, *failure: object) -> None:
        end = self.recorder.clock.mark()
        self.recorder.open.pop()
        self.recorder.close(self.name, self.begin, end, self.details)


class _Spans:
    """Recorders that mark the beginning and the end of every span."""

    def __init__(self, clock: Clock | None = None) -> None:
        self.clock: Clock = clock or HostClock()
        self.open: list[_Span] = []

    def span(self, name: str, **details: Any) -> AbstractContextManager[Any]:
        return _Span(self, name, details)

    def close(self, name: str, begin: Any, end: Any, details: dict[str, Any]) -> None:
        raise TypeError(f"{type(self).__name__} does not say what becomes of a span")


class Meter(_Spans):
    """Seconds by span name, summed until they are taken.

    Cheap enough to run always. On a GPU pairs of events wait until the device has passed them;
    there are never more than those of the work that the CPU runs ahead by, and some.
    """

    _FOLD_AT = 512

    def __init__(self, clock: Clock | None = None) -> None:
        super().__init__(clock)
        self._seconds: dict[str, float] = {}
        self._pending: list[tuple[str, Any, Any]] = []
        self._fold_at = self._FOLD_AT

    def close(self, name: str, begin: Any, end: Any, details: dict[str, Any]) -> None:
        self._pending.append((name, begin, end))
        if len(self._pending) >= self._fold_at:
            self._fold()
            self._fold_at = len(self._pending) + self._FOLD_AT

    def add(self, name: str, seconds: float) -> None:
        """Count time that something else measured."""
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def _fold(self) -> None:
        waiting = []
        for name, begin, end in self._pending:
            if self.clock.passed(end):
                self.add(name, (self.clock.at(end) - self.clock.at(begin)) / 1e9)
            else:
                waiting.append((name, begin, end))
        self._pending = waiting

    def seconds(self) -> dict[str, float]:
        """Seconds by span name so far, of what the device has done."""
        self._fold()
        return dict(self._seconds)


@dataclass(frozen=True, slots=True)
class Event:
    """A span that is over; begin and end in ns of `time.perf_counter_ns`."""

    name: str
    begin: int
    end: int
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """How long it took."""
        return (self.end - self.begin) / 1e9


class TimedRecorder(_Spans):
    """Keeps every span; for one step, or as long as memory allows.

    With `nvtx`, spans are also NVTX ranges, which NVIDIA's profilers show (CUDA only). A `meter`
    for the same device goes on summing meanwhile.
    """

    def __init__(
        self, clock: Clock | None = None, *, nvtx: bool = False, meter: Meter | None = None
    ) -> None:
        super().__init__(clock)
        self.nvtx, self.meter = nvtx, meter
        self._marked: list[tuple[str, Any, Any, dict[str, Any]]] = []

    def span(self, name: str, **details: Any) -> AbstractContextManager[Any]:
        inner = super().span(name, **details)
        return _WithRange(inner, range_name(name, details)) if self.nvtx else inner

    def close(self, name: str, begin: Any, end: Any, details: dict[str, Any]) -> None:
        self._marked.append((name, begin, end, details))
        if self.meter is not None:
            self.meter.close(name, begin, end, details)

    def add(self, name: str, begin: Any, end: Any, **details: Any) -> None:
        """Keep a span that was marked elsewhere; begin and end are marks of `clock`."""
        self._marked.append((name, begin, end, details))

    def events(self) -> list[Event]:
        """All spans that are over, by their beginning; on a GPU synchronise first."""
        at = self.clock.at
        found = [Event(name, at(begin), at(end), more) for name, begin, end, more in self._marked]
        return sorted(found, key=lambda event: (event.begin, -event.end))


class Ranges:
    """NVTX ranges around the spans of another recorder (CUDA only)."""

    def __init__(self, inner: Recorder) -> None:
        self.inner = inner

    def span(self, name: str, **details: Any) -> AbstractContextManager[Any]:
        return _WithRange(self.inner.span(name, **details), range_name(name, details))


class Labelled:
    """Adds details, such as the layer, to every span of another recorder."""

    def __init__(self, inner: Recorder, **labels: Any) -> None:
        self.inner, self.labels = inner, labels

    def span(self, name: str, **details: Any) -> AbstractContextManager[Any]:
        return self.inner.span(name, **self.labels, **details)


class _WithRange:
    __slots__ = ("inner", "text")

    def __init__(self, inner: AbstractContextManager[Any], text: str) -> None:
        self.inner, self.text = inner, text

    def __enter__(self) -> None:
        import torch

        torch.cuda.nvtx.range_push(self.text)
        self.inner.__enter__()

    def __exit__(self, *failure: Any) -> None:
        import torch

        self.inner.__exit__(*failure)
        torch.cuda.nvtx.range_pop()


def range_name(name: str, details: dict[str, Any]) -> str:
    """A span in a few words: "tile q[0,64) kv[0,64) forward step 0"."""
    parts = [name]
    tile = details.get("tile")
    if tile is not None:
        parts.append(f"q{tile.q} kv{tile.kv}")
    parts += [str(details["direction"])] if "direction" in details else []
    parts += [f"step {details['step']}"] if "step" in details else []
    return " ".join(parts)
