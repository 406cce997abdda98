# SPDX-License-Identifier: Apache-2.0
"""Fits find the numbers that made the rows, say how well they fit, refuse what cannot be."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from random import Random

import pytest

from megatron_seqpar.errors import ClusterError
from megatron_seqpar.simulate import load_cluster, save_cluster
from megatron_seqpar.simulate.calibrate import (
    LinkRow,
    TileRow,
    calibrated,
    fit_curve,
    fit_link,
)
from megatron_seqpar.simulate.cluster import Basis, Cluster, Curve, Direction

from .plans import curve, number

PEAK = 312e12
TRUTH = replace(
    curve(launch=12e-6, half_rows=5000, half_keys=300),
    share={64: number(0.5), 128: number(0.7), 256: number(0.6)},
)


def row(
    truth: Curve,
    sq: int,
    skv: int,
    *,
    dim: int = 128,
    causal: bool = False,
    direction: Direction = "forward",
    noise: float = 1.0,
) -> TileRow:
    """A row as a kernel that follows `truth` would give it."""
    pairs = sq * (sq + 1) // 2 if causal else sq * skv
    one = TileRow(direction, sq, skv, pairs, 8, dim, dim, 1, "bfloat16", 1.0)
    speed = PEAK * truth.efficiency(one.rows, one.keys, dim)
    return replace(one, seconds=noise * (truth.launch.value + one.flops / speed))


SIZES = list(product((256, 1024, 4096), (256, 1024, 8192)))


def test_exact_rows_give_the_curve_back() -> None:
    fit = fit_curve([row(TRUTH, *size) for size in SIZES], PEAK, "a test")
    assert fit.worst_error < 1e-9
    assert fit.curve.launch.value == pytest.approx(12e-6)
    assert fit.curve.share[128].value == pytest.approx(0.7)
    assert fit.curve.half_rows.value == pytest.approx(5000)
    assert fit.curve.half_keys.value == pytest.approx(300)
    figures = [fit.curve.launch, fit.curve.half_rows, fit.curve.half_keys, fit.curve.share[128]]
    assert {(figure.basis, figure.source) for figure in figures} == {(Basis.MEASURED, "a test")}


def test_other_head_dims_get_their_share() -> None:
    rows = [row(TRUTH, *size) for size in SIZES]
    rows += [row(TRUTH, *size, dim=dim) for dim in (64, 256) for size in SIZES[:3]]
    fit = fit_curve(rows, PEAK, "a test")
    shares = {dim: figure.value for dim, figure in fit.curve.share.items()}
    assert shares == pytest.approx({64: 0.5, 128: 0.7, 256: 0.6})
    assert fit.worst_error < 1e-9


def test_noise_is_averaged_and_reported() -> None:
    random = Random(1)
    rows = [row(TRUTH, *size, noise=1 + random.uniform(-0.05, 0.05)) for size in SIZES * 3]
    fit = fit_curve(rows, PEAK, "a test")
    assert fit.curve.share[128].value == pytest.approx(0.7, rel=0.05)
    assert 0.001 < fit.median_error < 0.05
    assert fit.median_error <= fit.worst_error < 0.08


def test_no_number_is_below_zero() -> None:
    # the fewer keys the faster: no curve of ours, whose best is not to depend on them
    rows = [row(curve(share=0.5), *size) for size in SIZES]
    rows = [replace(r, seconds=r.seconds * (1 - 100 / r.keys / 1.5)) for r in rows]
    found = fit_curve(rows, PEAK, "a test").curve
    assert found.half_keys.value == 0
    assert min(found.launch.value, found.half_rows.value) >= 0


def test_what_cannot_be_fitted() -> None:
    rows = [row(TRUTH, *size) for size in SIZES]
    with pytest.raises(ClusterError, match="3 rows of head dim 128; give at least 4"):
        fit_curve(rows[:3], PEAK, "a test")
    with pytest.raises(ClusterError, match="give rows of one direction"):
        fit_curve([*rows, row(TRUTH, 512, 512, causal=True)], PEAK, "a test")
    with pytest.raises(ClusterError, match="give rows of one direction"):
        fit_curve([], PEAK, "a test")
    with pytest.raises(ClusterError, match=r"1\.40 of the peak; the cluster's peak is too low"):
        fit_curve(rows, PEAK / 2, "a test")
    with pytest.raises(ClusterError, match="seconds do not grow with FLOPs"):
        fit_curve([replace(r, seconds=1.0) for r in rows], PEAK, "a test")


# ---- links ----------------------------------------------------------------------------------


def link_rows(latency: float, bandwidth: float, within_node: bool = True) -> list[LinkRow]:
    sizes = (1 << 10, 1 << 16, 1 << 22, 1 << 26)
    return [LinkRow(size, latency + size / bandwidth, within_node) for size in sizes]


def test_a_link() -> None:
    before = load_cluster("dgx-a100").intra
    after = fit_link(link_rows(7e-6, 150e9), before, "a test")
    assert after.bandwidth == pytest.approx(150e9)
    assert after.latency.value == pytest.approx(7e-6)
    assert (after.line_rate, after.kind) == (before.line_rate, before.kind)
    assert after.share.basis is after.latency.basis is Basis.MEASURED


def test_a_link_faster_than_its_line_rate() -> None:
    after = fit_link(link_rows(7e-6, 400e9), load_cluster("dgx-a100").intra, "a test")
    assert after.bandwidth == pytest.approx(400e9)
    assert after.share.value == 1
    assert after.line_rate.basis is Basis.MEASURED


def test_links_that_cannot_be_fitted() -> None:
    link = load_cluster("dgx-a100").intra
    with pytest.raises(ClusterError, match="messages of at least two sizes"):
        fit_link([LinkRow(8, 1.0), LinkRow(8, 1.1)], link, "a test")
    with pytest.raises(ClusterError, match="seconds do not grow with bytes"):
        fit_link([LinkRow(8, 1.0), LinkRow(16, 0.5)], link, "a test")


# ---- a whole cluster --------------------------------------------------------------------------


def test_a_cluster_keeps_what_was_not_measured(tmp_path: Path) -> None:
    before = load_cluster("dgx-a100")
    tiles = [row(TRUTH, *size) for size in SIZES]
    squares = (256, 512, 1024, 4096, 8192)
    tiles += [row(TRUTH, size, size, causal=True, direction="backward") for size in squares]
    tiles.append(replace(tiles[0], dtype="float32"))  # of another dtype: left out
    after, fits = calibrated(before, tiles, link_rows(7e-6, 150e9), "a test", "mine")
    assert set(fits) == {"forward_full", "backward_band"}
    assert after.kernel.forward_full == fits["forward_full"].curve
    assert after.kernel.forward_band == before.kernel.forward_band
    assert (after.inter, after.device) == (before.inter, before.device)
    assert after.intra.bandwidth == pytest.approx(150e9)
    save_cluster(after, tmp_path / "mine.yaml")
    assert close(load_cluster(tmp_path / "mine.yaml"), after)
    network, _ = calibrated(before, [], link_rows(20e-6, 10e9, within_node=False), "a test")
    assert network.inter.bandwidth == pytest.approx(10e9)
    assert (network.intra, network.kernel) == (before.intra, before.kernel)
    assert network.name == "dgx-a100"


def close(one: Cluster, other: Cluster) -> bool:
    """Equal to the digits that a file keeps."""
    return (
        one.name == other.name
        and one.intra.bandwidth == pytest.approx(other.intra.bandwidth)
        and one.kernel.forward_full.efficiency(1e4, 1e3, 128)
        == pytest.approx(other.kernel.forward_full.efficiency(1e4, 1e3, 128))
        and one.kernel.backward_band.half_keys.source == "a test"
    )
