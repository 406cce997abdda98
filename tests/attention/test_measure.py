# SPDX-License-Identifier: Apache-2.0
"""Rows of measurements: what was asked for, of the right sizes, and fit for a calibration."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_seqpar.attention import ThreadTransport, Transport, measure
from megatron_seqpar.attention.measure import Shape, measure_links, measure_tiles, shapes_up_to
from megatron_seqpar.errors import KernelError
from megatron_seqpar.simulate import load_cluster
from megatron_seqpar.simulate.calibrate import LinkRow, calibrated


def test_shapes() -> None:
    shapes = shapes_up_to(64)
    assert len(shapes) == len(set(shapes)) == 10
    assert {shape.pairs for shape in shapes if shape.causal} == {36, 136, 528, 2080}
    assert {shape.pairs for shape in shapes if not shape.causal} == {64, 256, 1024, 4096, 512}


def test_rows_of_tiles() -> None:
    shapes = (Shape(16, 48), Shape(16, 16, True))
    rows = measure_tiles(
        shapes, device="cpu", dtype=torch.float64, kernel="reference", heads=4, kv_heads=2,
        head_dim=24, value_dim=16, batch=3, repeats=2,
    )  # fmt: skip
    asked = [(r.direction, r.sq, r.skv, r.pairs, r.full) for r in rows]
    assert asked == [
        ("forward", 16, 48, 768, True),
        ("backward", 16, 48, 768, True),
        ("forward", 16, 16, 136, False),
        ("backward", 16, 16, 136, False),
    ]
    assert {(r.heads, r.head_dim, r.value_dim, r.batch) for r in rows} == {(4, 24, 16, 3)}
    assert {r.dtype for r in rows} == {"float64"}
    assert all(0 < r.seconds < 10 for r in rows)
    with pytest.raises(KernelError, match="flash2"):
        measure_tiles(shapes, device="cpu", dtype=torch.float32, kernel="flash2")


def test_the_kernel_is_called_as_often_as_said(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any]] = []

    class Clock:
        """Shows what the kernel below says has passed."""

        now = 0

        def mark(self) -> int:
            return self.now

        at = staticmethod(int)

    clock = Clock()

    class Slow:
        """Takes a known time: 2 ms forward, 5 ms backward."""

        def forward(self, q: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
            calls.append(("forward", rest[-1]))
            clock.now += 2_000_000
            return q, q

        def backward(self, *tensors: Any) -> None:
            calls.append(("backward", tensors[-1]))
            clock.now += 5_000_000

    monkeypatch.setattr(measure, "select", lambda *a, **k: ("slow", Slow()))
    monkeypatch.setattr(measure, "clock_of", lambda kind: clock)
    forward, backward = measure_tiles(
        [Shape(8, 8, True)], device="cpu", dtype=torch.float32, head_dim=64, repeats=3
    )
    # once for its output, once to warm up, three times measured
    assert [name for name, _ in calls] == ["forward"] * 5 + ["backward"] * 4
    assert {(call.low, call.high, call.scale) for _, call in calls} == {(None, 0, 0.125)}
    assert (forward.seconds, backward.seconds) == (0.002, 0.005)


def on_threads(size: int, **options: Any) -> list[list[LinkRow]]:
    def work(transport: Transport) -> list[LinkRow]:
        return measure_links(transport, repeats=2, **options)

    return ThreadTransport.run(size, work)


def test_rows_of_links() -> None:
    first, *others = on_threads(2, sizes=(64, 4096))
    assert [(row.size, row.within_node) for row in first] == [(64, True), (4096, True)]
    assert all(0 < row.seconds < 10 for row in first)
    assert others == [[]]


def test_rows_of_links_between_nodes() -> None:
    first, *others = on_threads(5, sizes=(64, 4096), node_size=2)
    asked = [(row.size, row.within_node) for row in first]
    assert asked == [(64, True), (4096, True), (64, False), (4096, False)]
    assert others == [[]] * 4
    # one rank a node: there is no link within one
    lone = on_threads(2, sizes=(64,), node_size=1)[0]
    assert [(row.size, row.within_node) for row in lone] == [(64, False)]
    assert on_threads(1, sizes=(64,)) == [[]]


def test_what_is_measured_can_be_fitted() -> None:
    rows = measure_tiles(
        shapes_up_to(256), device="cpu", dtype=torch.float32, heads=2, head_dim=32, repeats=3
    )
    assert len(rows) == 20
    known = load_cluster("laptop")
    # above what any core reaches, so that every share is below 1
    peak = replace(known.device.peak, values={"float32": 1e13})
    before = replace(known, device=replace(known.device, peak=peak))
    after, fits = calibrated(before, rows, [], "a test", "here")
    assert set(fits) == {"forward_full", "forward_band", "backward_full", "backward_band"}
    assert after.kernel != before.kernel
    assert all(0 < fit.curve.share[32].value <= 1 for fit in fits.values())
