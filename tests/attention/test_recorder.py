# SPDX-License-Identifier: Apache-2.0
"""Recorders: what becomes of the spans that the executor opens."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from megatron_seqpar.attention.recorder import (
    SILENT,
    CudaClock,
    Labelled,
    Meter,
    Ranges,
    TimedRecorder,
    clock_of,
    range_name,
)


class LaterClock:
    """As a GPU's: moments come only when `reached` says so; a mark is its number."""

    def __init__(self) -> None:
        self.marks, self.reached = 0, 0

    def mark(self) -> int:
        self.marks += 1
        return self.marks

    def passed(self, mark: int) -> bool:
        return mark <= self.reached

    def at(self, mark: int) -> int:
        assert self.passed(mark), "asked too early"
        return mark * 1_000_000_000


def pretend_step(recorder, step=0):
    """The calls of one step of the executor."""
    with recorder.span("post", step=step, transfers=((), ()), direction="forward"):
        time.sleep(0.001)
    with recorder.span("tile", step=step, tile=None, direction="forward"):
        time.sleep(0.004)
    with recorder.span("wait", step=step, transfers=((), ()), direction="forward"):
        time.sleep(0.002)


def test_silence_costs_next_to_nothing():
    one, other = SILENT.span("tile", step=0), SILENT.span("wait", step=1)
    assert one is other  # nothing is made
    seconds = []
    for _ in range(5):  # processor time, and the best: the machine may be busy
        start = time.thread_time()
        for step in range(10_000):
            with SILENT.span("tile", step=step, tile=None, direction="forward"):
                pass
        seconds.append(time.thread_time() - start)
    assert min(seconds) < 0.1  # 10 us a span, some thirty times what it takes


def test_events_have_their_times_and_details():
    recorder = TimedRecorder()
    before = time.perf_counter_ns()
    pretend_step(recorder, step=3)
    after = time.perf_counter_ns()
    events = recorder.events()
    assert [event.name for event in events] == ["post", "tile", "wait"]
    assert all(event.details["step"] == 3 for event in events)
    assert before <= events[0].begin <= events[0].end <= events[1].begin
    assert events[-1].end <= after
    assert events[1].seconds >= 0.004


def test_a_span_that_fails_is_kept_and_the_failure_goes_on():
    recorder = TimedRecorder()
    with pytest.raises(KeyError), recorder.span("tile", step=0):
        raise KeyError("tile")
    assert [event.name for event in recorder.events()] == ["tile"]
    assert recorder.open == []


def test_open_spans_are_known_while_they_last():
    recorder = TimedRecorder()
    with recorder.span("post", step=7):
        assert recorder.open[-1].details == {"step": 7}
    assert recorder.open == []


def test_labels_reach_every_span_of_the_call():
    recorder = TimedRecorder()
    pretend_step(Labelled(recorder, layer=5, microbatch=1))
    assert {event.details["layer"] for event in recorder.events()} == {5}
    assert {event.details["microbatch"] for event in recorder.events()} == {1}


def test_meter_sums_by_name():
    meter = Meter()
    start = time.perf_counter()
    for step in range(3):
        pretend_step(meter, step)
    took = time.perf_counter() - start
    meter.add("wait", 10.0)
    seconds = meter.seconds()
    assert set(seconds) == {"post", "tile", "wait"}
    assert seconds["tile"] >= 0.012
    assert seconds["wait"] >= 10.006
    assert sum(seconds.values()) <= 10 + took


def test_a_meter_goes_on_while_events_are_kept():
    meter = Meter()
    recorder = TimedRecorder(meter=meter)
    pretend_step(recorder)
    start = time.perf_counter()
    pretend_step(meter)
    took = time.perf_counter() - start
    kept = {event.name: event.seconds for event in recorder.events()}
    for name, seconds in meter.seconds().items():
        assert kept[name] < seconds < kept[name] + took


def test_meter_never_waits_for_the_device_and_holds_a_bounded_number_of_marks():
    clock = LaterClock()
    meter = Meter(clock)
    for _ in range(2000):
        with meter.span("tile"):
            clock.reached = clock.marks - 10  # the device is ten marks behind
        assert len(meter._pending) <= 2 * Meter._FOLD_AT
    clock.reached = clock.marks - 2  # all but the last span
    assert meter.seconds() == {"tile": pytest.approx(1999)}
    clock.reached = clock.marks
    assert meter.seconds() == {"tile": pytest.approx(2000)}


def test_events_of_a_device_are_read_on_its_clock():
    clock = LaterClock()
    recorder = TimedRecorder(clock)
    with recorder.span("wait", step=0):
        clock.mark()
    recorder.add("transfer", 2, 9, peer=1)
    clock.reached = 100
    wait, transfer = recorder.events()
    assert (wait.name, wait.begin, wait.end) == ("wait", 1_000_000_000, 3_000_000_000)
    assert (transfer.name, transfer.seconds, transfer.details) == ("transfer", 7.0, {"peer": 1})


@pytest.fixture
def nvtx(monkeypatch):
    """What is pushed and popped, in order."""
    seen: list[str] = []
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", seen.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: seen.append("pop"))
    return seen


@pytest.mark.parametrize("make", [lambda: TimedRecorder(nvtx=True), lambda: Ranges(SILENT)])
def test_ranges_for_nvidias_profilers(nvtx, make):
    tile = SimpleNamespace(q="[0,64)", kv="[64,128)")
    with make().span("tile", step=2, tile=tile, direction="backward"):
        assert nvtx == ["tile q[0,64) kv[64,128) backward step 2"]
    assert nvtx[1:] == ["pop"]


def test_no_ranges_unless_asked(nvtx):
    pretend_step(TimedRecorder())
    assert nvtx == []


def test_range_name_without_details():
    assert range_name("merge", {}) == "merge"


def test_the_cpu_has_the_clock_of_perf_counter():
    clock = clock_of("cpu")
    before = time.perf_counter_ns()
    mark = clock.mark()
    assert clock.passed(mark)
    assert before <= clock.at(mark) <= time.perf_counter_ns()


@pytest.mark.needs_gpu
def test_a_gpu_is_timed_without_being_waited_for():
    clock = clock_of("cuda")
    assert isinstance(clock, CudaClock)
    recorder = TimedRecorder(clock, nvtx=True)
    work = torch.randn(8192, 8192, device="cuda")
    work @ work
    torch.cuda.synchronize()
    start = time.perf_counter()
    with recorder.span("tile", step=0):
        for _ in range(20):
            work @ work
    issued = time.perf_counter() - start
    torch.cuda.synchronize()
    finished = time.perf_counter() - start
    (event,) = recorder.events()
    assert issued < event.seconds  # the span did not wait, and knows the device's own time
    assert 0.5 * finished < event.seconds <= 1.05 * finished
    assert event.begin / 1e9 == pytest.approx(start, abs=0.05)
