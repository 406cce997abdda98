# SPDX-License-Identifier: Apache-2.0
"""Sampling a GPU through a stand-in for NVML: values, units, errors, the end of the thread."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from megatron_seqpar.telemetry import nvml, sampler
from megatron_seqpar.telemetry.nvml import Gpu, NvmlAbsent
from megatron_seqpar.telemetry.sampler import Sampler, Series
from tests.telemetry.sensors import Sensors

STEADY = {
    "memory_used_bytes": 64 << 30,
    "power_watts": 412.5,
    "sm_clock_mhz": 1755,
    "utilization_percent": 87,
    "temperature_celsius": 61,
}
LINKS = {"nvlink_sent_bytes_per_second", "nvlink_received_bytes_per_second"}


def until(reached: Callable[[], bool]) -> None:
    """Give the thread time; a hang ends by the test's own limit."""
    while not reached():
        time.sleep(0.001)


def sampled(sensors: Sensors, samples: int = 5) -> Sampler:
    """A sampler that has taken some samples and was stopped."""
    taken = Sampler(Gpu("0", sensors), interval=0.001)
    taken.start()
    until(lambda: taken._samples >= samples or not taken.running)
    taken.stop()
    return taken


def test_values_have_the_units_of_their_names() -> None:
    gpu = Gpu("GPU-0", Sensors())
    assert gpu.name == "NVIDIA H100 80GB HBM3"
    assert {name: ask() for name, ask in gpu.quantities.items() if name not in LINKS} == STEADY


def test_traffic_of_nvlink_is_a_rate_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=10.0)
    monkeypatch.setattr(nvml, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    sensors = Sensors()
    sensors.kib = {138: 5_000, 139: 7}
    sent, received = (Gpu("0", sensors).quantities[name] for name in sorted(LINKS, reverse=True))
    assert (sent(), received()) == (None, None)  # a counter since the driver was loaded
    sensors.kib, clock.now = {138: 5_000 + 4_000, 139: 7}, 12.0
    assert (sent(), received()) == (4_000 * 1024 / 2.0, 0.0)
    sensors.kib[138] = 3  # the driver was loaded anew
    clock.now = 13.0
    assert sent() is None
    sensors.kib[138] = 3 + 10
    clock.now = 14.0
    assert sent() == 10 * 1024


def test_a_thread_samples_until_it_is_stopped() -> None:
    sensors = Sensors()
    taken = sampled(sensors)
    assert not taken.running
    assert sensors.open == 0  # NVML was shut down
    calls = dict(sensors.times)
    taken.stop()
    assert sensors.times == calls
    summary = taken.summary()
    assert summary["samples"] >= 5
    steady = {name: {"median": value, "max": value} for name, value in STEADY.items()}
    assert {n: q for n, q in summary["quantities"].items() if n not in LINKS} == steady
    assert summary["quantities"]["nvlink_sent_bytes_per_second"] == {"median": 0.0, "max": 0.0}
    assert (summary["lacking"], summary["failed"]) == ({}, {})
    assert taken.latest().keys() == STEADY.keys() | LINKS


def test_what_a_gpu_does_not_serve_is_asked_once_and_told() -> None:
    sensors = Sensors(link_error=3)
    summary = sampled(sensors).summary()
    assert summary["lacking"] == dict.fromkeys(LINKS, "Not Supported")
    assert sensors.times["nvmlDeviceGetFieldValues"] == 2
    assert summary["quantities"].keys() == STEADY.keys()
    assert summary["samples"] >= 5
    whole = sampled(Sensors(fails={"nvmlDeviceGetPowerUsage": 3})).summary()
    assert whole["lacking"] == {"power_watts": "Not Supported"}
    assert whole["quantities"].keys() == (STEADY.keys() | LINKS) - {"power_watts"}


def test_an_older_package_lacks_a_function() -> None:
    class Older(Sensors):
        @property
        def nvmlDeviceGetClockInfo(self) -> None:  # type: ignore[override]
            raise AttributeError("nvmlDeviceGetClockInfo")

    lacking = sampled(Older()).summary()["lacking"]
    assert list(lacking) == ["sm_clock_mhz"]


def test_a_query_that_fails_is_asked_again_and_counted() -> None:
    summary = sampled(Sensors(fails={"nvmlDeviceGetTemperature": 2})).summary()
    failed = summary["failed"].pop("temperature_celsius")
    assert failed["last"] == "Invalid Argument"
    assert failed["times"] >= 5
    assert summary["failed"] == {}
    assert "temperature_celsius" not in summary["quantities"]


def test_an_error_that_nobody_expects_ends_sampling_alone() -> None:
    sensors = Sensors()
    sensors.kib.clear()  # a KeyError inside of the query
    summary = sampled(sensors).summary()
    assert summary["ended_by"] == "KeyError: 138"
    assert summary["quantities"].keys() == STEADY.keys()


def test_without_nvml_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(NvmlAbsent, match=r"nvidia-ml-py is not installed .*\[gpu\]"):
        Gpu("0")
    with pytest.raises(NvmlAbsent, match="no driver: Driver Not Loaded"):
        Gpu("0", Sensors(fails={"nvmlInit": 9}))
    sensors = Sensors()
    with pytest.raises(NvmlAbsent, match="knows no GPU GPU-7: Not Found"):
        Gpu("7", sensors)
    assert sensors.open == 0


def test_long_series_take_no_more_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "KEPT", 64)
    series = Series()
    for value in range(10_001):
        series.add(value)
    assert (series.count, series.largest, series.last) == (10_001, 10_000, 10_000)
    assert len(series._kept) <= 64
    gaps = {after - before for before, after in zip(series._kept, series._kept[1:], strict=False)}
    assert len(gaps) == 1  # evenly over the whole run
    assert series.median == pytest.approx(5_000, abs=2 * gaps.pop())


def test_a_run_on_a_gpu_is_sampled_and_summed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("megatron.training")
    import torch

    from megatron_seqpar.integration import device_samples
    from megatron_seqpar.integration.closing_text import _telemetry

    device_samples.end()
    monkeypatch.setitem(sys.modules, "pynvml", Sensors(link_error=3))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="0")
    )
    device_samples.begin()
    until(lambda: device_samples.latest().keys() == STEADY.keys())
    running = device_samples._sampler
    device_samples.begin()  # the report's and TensorBoard's are one
    assert device_samples._sampler is running
    record = device_samples.end()
    assert device_samples.end() is record
    assert device_samples.latest() == {}
    other = {**record, "quantities": {"power_watts": {"median": 300.0, "max": 650.0}}}
    assert _telemetry([record, other]) == (
        "356 W (max 650), 1,755 MHz (max 1,755), 87% busy (max 87), 61 C (max 61), "
        "64.0 GiB used (max 64.0); without nvlink_sent_bytes_per_second, "
        "nvlink_received_bytes_per_second: Not Supported"
    )
    assert _telemetry([{"absent": "a"}, {"absent": "a"}]) == "absent: a"


@pytest.mark.needs_gpu
def test_values_of_a_real_gpu_are_plausible() -> None:
    pytest.importorskip("pynvml")
    import torch

    taken = Sampler(Gpu(str(torch.cuda.get_device_properties(0).uuid)), interval=0.02)
    held = torch.ones(1 << 28, dtype=torch.uint8, device="cuda")
    taken.start()
    until(lambda: taken._samples >= 5 or not taken.running)
    taken.stop()
    summary = taken.summary()
    assert "ended_by" not in summary
    medians = {name: value["median"] for name, value in summary["quantities"].items()}
    assert medians["memory_used_bytes"] >= held.numel()
    assert 5 < medians["power_watts"] < 2000
    assert 100 < medians["sm_clock_mhz"] < 5000
    assert 0 <= medians["utilization_percent"] <= 100
    assert 10 < medians["temperature_celsius"] < 110
    asked = medians.keys() | summary["lacking"].keys() | summary["failed"].keys()
    assert asked == STEADY.keys() | LINKS
