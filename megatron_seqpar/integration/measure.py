# SPDX-License-Identifier: Apache-2.0
"""What every attention call of a training run reports to: sums always, single events when traced.

Sums of seconds (waiting, computing, ...) and bytes feed the report and TensorBoard. Without a GPU
they are taken always. On a GPU they take CUDA events, and are taken when somebody will read them.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from megatron_seqpar.attention.recorder import (
    SILENT,
    Labelled,
    Meter,
    Ranges,
    Recorder,
    TimedRecorder,
    clock_of,
)
from megatron_seqpar.attention.watch import WatchedTransport

if TYPE_CHECKING:
    from megatron_seqpar.attention.transport import Transport

NAMES = {"wait": "attention_wait_seconds", "tile": "attention_compute_seconds"}
"""Spans that are reported, and under which name."""

_calls = itertools.count(1)


class Measurement:
    """State of one process: the sums, and the traced step when there is one.

    Attributes:
        wanted: somebody reads the sums.
        traced: what the running step's events go to, None in most steps.
        microbatch: number of the micro-batch whose forward step runs, None outside.
    """

    def __init__(self) -> None:
        self.wanted = False
        self.traced: TracedAttention | None = None
        self.microbatch: int | None = None
        self._meter: Meter | None = None
        self._transports: list[Transport] = []

    def attention(
        self, transport: Transport, device: torch.device, layer: int
    ) -> tuple[Transport, Recorder]:
        """The transport and the recorder for one call of attention.

        layer: Megatron's number of the layer, from 1.
        """
        if transport not in self._transports:
            self._transports.append(transport)
        if self.traced is not None:
            labels = {"call": next(_calls), "layer": layer, "microbatch": self.microbatch}
            if in_backward():
                labels["recompute"] = True
            known = {name: value for name, value in labels.items() if value is not None}
            return self.traced.watched(transport), Labelled(self.traced.recorder, **known)
        on_gpu = device.type == "cuda"
        recorder: Recorder = SILENT
        if self.wanted or not on_gpu:
            recorder = self._summing(device.type)
        profiled = on_gpu and torch.autograd._profiler_enabled()
        return transport, Ranges(recorder) if profiled else recorder

    def totals(self) -> dict[str, float]:
        """Since the start: "attention_wait_seconds", "attention_compute_seconds", "bytes"."""
        seconds: Mapping[str, float] = {} if self._meter is None else self._meter.seconds()
        found = {shown: seconds.get(name, 0.0) for name, shown in NAMES.items()}
        sent = sum(transport.counters.bytes for transport in self._transports)
        return {**found, "attention_bytes_sent": float(sent)}

    def _summing(self, device_type: str) -> Meter:
        if self._meter is None:
            self._meter = Meter(clock_of(device_type))
        return self._meter

    def begin(self, device_type: str) -> TracedAttention:
        """Trace attention from here on; on a GPU this waits for it."""
        self.traced = TracedAttention(device_type, self._summing(device_type))
        return self.traced

    def end(self) -> None:
        """Trace no more."""
        self.traced = None


class TracedAttention:
    """Recorder and watched transports of one traced step."""

    def __init__(self, device_type: str, meter: Meter) -> None:
        self.recorder = TimedRecorder(
            clock_of(device_type), nvtx=device_type == "cuda", meter=meter
        )
        self.transports: dict[int, WatchedTransport] = {}

    def watched(self, transport: Transport) -> Transport:
        """The watched form of a transport, the same for the whole step."""
        if transport.size == 1:
            return transport
        known = self.transports.get(id(transport))
        if known is None:
            known = self.transports[id(transport)] = WatchedTransport(transport, self.recorder)
        return known

    def close(self) -> None:
        """End the watching."""
        for watched in self.transports.values():
            watched.close()


def in_backward() -> bool:
    """Whether autograd is in the middle of a backward pass: attention runs again then."""
    return bool(torch._C._current_graph_task_id() != -1)


_measurement = Measurement()


def current() -> Measurement:
    """The measurement of this process."""
    return _measurement


def totals_since(before: Mapping[str, Any]) -> dict[str, float]:
    """What was added to the totals since `before`, an earlier answer of theirs."""
    return {name: value - before.get(name, 0) for name, value in current().totals().items()}
