# SPDX-License-Identifier: Apache-2.0
"""Samples of a GPU in a thread beside the training, and what they come to.

A query that this GPU does not serve is asked once and told; one that fails is counted and asked
again. Neither ends the sampling, and nothing here raises into the training.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from .nvml import Failed, Lacking

KEPT = 4096
END_SECONDS = 5.0


class Sampled(Protocol):
    """What is sampled: a `nvml.Gpu`."""

    name: str
    quantities: dict[str, Callable[[], float | None]]

    def close(self) -> None:
        """Ask no more."""


class Series:
    """Values as they come: how many, the largest, and the median of at most `KEPT` of them.

    Of a long series every second, fourth, ... value is kept, so that a run of weeks takes no more
    memory than one of an hour; the largest is of all values.
    """

    def __init__(self) -> None:
        self.count = 0
        self.largest = float("-inf")
        self.last = float("nan")
        self._kept: list[float] = []
        self._every = 1

    def add(self, value: float) -> None:
        """One more."""
        if self.count % self._every == 0:
            self._kept.append(value)
        self.count += 1
        self.largest, self.last = max(self.largest, value), value
        if len(self._kept) >= KEPT:
            self._kept = self._kept[::2]
            self._every *= 2

    @property
    def median(self) -> float:
        """Of what is kept; there must be a value."""
        return statistics.median(self._kept)


class Sampler:
    """Asks a GPU for everything now and every `interval` seconds, from `start` to `stop`."""

    def __init__(self, gpu: Sampled, interval: float) -> None:
        self.gpu, self.interval = gpu, interval
        self.series: dict[str, Series] = {name: Series() for name in gpu.quantities}
        self.lacking: dict[str, str] = {}
        self.failed: dict[str, tuple[int, str]] = {}
        self.ended_by: str | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="seqpar-telemetry", daemon=True)
        self._samples = 0

    def start(self) -> None:
        """Begin, once."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread and close the GPU; harmless a second time.

        A driver that does not answer is waited for a few seconds, and then left alone.
        """
        if self._end.is_set():
            return
        self._end.set()
        self._thread.join(END_SECONDS)
        if self._thread.is_alive():
            self.ended_by = f"NVML did not answer for {END_SECONDS:.0f} s"

    @property
    def running(self) -> bool:
        """Whether the thread is there."""
        return self._thread.is_alive()

    def latest(self) -> dict[str, float]:
        """The last value of each quantity that has one."""
        return {name: series.last for name, series in self.series.items() if series.count}

    def summary(self) -> dict[str, Any]:
        """Plain values: median and max by quantity, and what is missing and why."""
        found: dict[str, Any] = {
            "device": self.gpu.name,
            "interval_seconds": self.interval,
            "samples": self._samples,
            "quantities": {
                name: {"median": series.median, "max": series.largest}
                for name, series in self.series.items()
                if series.count
            },
            "lacking": dict(self.lacking),
            "failed": {
                name: {"times": times, "last": why} for name, (times, why) in self.failed.items()
            },
        }
        if self.ended_by is not None:
            found["ended_by"] = self.ended_by
        return found

    def _run(self) -> None:
        due = time.monotonic()
        try:
            while not self._end.is_set():
                self._sample()
                due = max(due + self.interval, time.monotonic())
                self._end.wait(due - time.monotonic())
            self.gpu.close()
        except Exception as error:  # told in the summary; the training has no part in it
            self.ended_by = f"{type(error).__name__}: {error}"

    def _sample(self) -> None:
        for name, ask in self.gpu.quantities.items():
            if name in self.lacking:
                continue
            try:
                value = ask()
            except Lacking as error:
                self.lacking[name] = str(error)
            except Failed as error:
                self.failed[name] = self.failed.get(name, (0, ""))[0] + 1, str(error)
            else:
                if value is not None:
                    self.series[name].add(float(value))
        self._samples += 1
