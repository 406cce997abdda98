# SPDX-License-Identifier: Apache-2.0
"""A cluster's numbers from measured rows; `attention/measure.py` takes such rows.

Note: the fit
-------------
The kernel's curve (see `cluster.py`) gives a tile of F = flops / peak seconds at full speed

    seconds = launch + (F + half_rows F / rows + half_keys F / keys) / share

which is linear in launch, 1/share, half_rows/share and half_keys/share. Each row is divided by its
seconds, so that relative errors count and short tiles as much as long ones, and the least squares
solution with no number below zero is taken. A link's time is linear in latency and 1/bandwidth, and
is fitted in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import median
from typing import TYPE_CHECKING

from ..errors import ClusterError
from .cluster import Basis, Cluster, Curve, Direction, Figure, Kernel, Link
from .costs import attention_flops

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class TileRow:
    """One measured kernel call.

    Attributes:
        direction: which pass.
        sq, skv: queries and keys of the tile.
        pairs: interacting pairs of each head; sq * skv for a full tile.
        heads, head_dim, value_dim: query heads, dims of keys and values.
        batch: samples.
        dtype: its name.
        seconds: of one call, the median of several.
    """

    direction: Direction
    sq: int
    skv: int
    pairs: int
    heads: int
    head_dim: int
    value_dim: int
    batch: int
    dtype: str
    seconds: float

    @property
    def full(self) -> bool:
        """Whether every pair interacts."""
        return self.pairs == self.sq * self.skv

    @property
    def flops(self) -> int:
        """FLOPs of its matrix products."""
        per_sample = attention_flops(
            self.pairs, self.heads, self.head_dim, self.value_dim, self.direction
        )
        return self.batch * per_sample

    @property
    def rows(self) -> int:
        """Queries times heads and batch."""
        return self.sq * self.heads * self.batch

    @property
    def keys(self) -> float:
        """Mean keys that a query sees."""
        return self.pairs / self.sq


@dataclass(frozen=True)
class LinkRow:
    """One measured message: bytes one way, seconds from both ends being ready to its arrival."""

    size: int
    seconds: float
    within_node: bool = True


@dataclass(frozen=True)
class Fit:
    """What was fitted and how well: relative errors of the fitted against the measured seconds."""

    curve: Curve
    median_error: float
    worst_error: float


def fit_curve(rows: Sequence[TileRow], peak: float, source: str) -> Fit:
    """The curve of one pass and kind of tile.

    With several head dims, the one with most rows is fitted and the others get the share at which
    the curve is right in the median.

    Args:
        rows: of one direction, all full or none of them, of one dtype.
        peak: FLOP/s that `share` is a share of.
        source: said of every number, whose basis is "measured".

    Raises:
        ClusterError: fewer than four rows of every head dim, rows of several kinds, or rows that a
            peak this low cannot explain.
    """
    if len({(row.direction, row.full, row.dtype) for row in rows}) != 1:
        raise ClusterError("fit_curve: give rows of one direction, one dtype, all full or all cut")
    dims = sorted({row.head_dim for row in rows})
    main = max(dims, key=lambda dim: sum(row.head_dim == dim for row in rows))
    chosen = [row for row in rows if row.head_dim == main]
    if len(chosen) < 4:
        raise ClusterError(f"fit_curve: {len(chosen)} rows of head dim {main}; give at least 4")
    columns = [(1.0, at := row.flops / peak, at / row.rows, at / row.keys) for row in chosen]
    launch, whole, by_rows, by_keys = _relative_fit(columns, [row.seconds for row in chosen])
    if whole <= 0:
        raise ClusterError("fit_curve: seconds do not grow with FLOPs; give longer tiles")
    figure = _figure(source)
    curve = Curve(
        launch=figure(launch),
        share={main: figure(_share(1 / whole))},
        half_rows=figure(by_rows / whole),
        half_keys=figure(by_keys / whole),
    )
    shares = dict(curve.share)
    for dim in dims:
        if dim != main:
            ratios = [
                (_seconds(row, curve, peak) - launch) / max(row.seconds - launch, 1e-12)
                for row in rows
                if row.head_dim == dim
            ]
            shares[dim] = figure(_share(curve.share[main].value * median(ratios)))
    curve = replace(curve, share=dict(sorted(shares.items())))
    errors = [abs(_seconds(row, curve, peak) / row.seconds - 1) for row in rows]
    return Fit(curve, median(errors), max(errors))


def fit_link(rows: Sequence[LinkRow], link: Link, source: str) -> Link:
    """A link with the latency and the share of its line rate that the rows show.

    Raises `ClusterError` for fewer than two sizes.
    """
    if len({row.size for row in rows}) < 2:
        raise ClusterError("fit_link: give messages of at least two sizes")
    columns = [(1.0, row.size / link.line_rate.value) for row in rows]
    latency, per_byte = _relative_fit(columns, [row.seconds for row in rows])
    if per_byte <= 0:
        raise ClusterError("fit_link: seconds do not grow with bytes; give longer messages")
    figure = _figure(source)
    if per_byte < 1:  # faster than the line rate the file had
        rate = figure(link.line_rate.value / per_byte)
        return replace(link, line_rate=rate, share=figure(1.0), latency=figure(latency))
    return replace(link, share=figure(1 / per_byte), latency=figure(latency))


def calibrated(
    cluster: Cluster,
    tiles: Sequence[TileRow],
    links: Sequence[LinkRow],
    source: str,
    name: str | None = None,
) -> tuple[Cluster, dict[str, Fit]]:
    """The cluster with what was measured in place of what it had, and the fits by curve name.

    Kinds of tile and links without rows keep their numbers. Tiles may be of several dtypes; the
    kind of the most rows is fitted (the peak differs, the curve is one).
    """
    fits = {}
    for direction in ("forward", "backward"):
        for kind in ("full", "band"):
            rows = [r for r in tiles if r.direction == direction and r.full == (kind == "full")]
            if rows:
                dtypes = [row.dtype for row in rows]
                dtype = max(dtypes, key=dtypes.count)
                same = [row for row in rows if row.dtype == dtype]
                fits[f"{direction}_{kind}"] = fit_curve(same, cluster.peak(dtype), source)
    kernel: Kernel = replace(cluster.kernel, **{key: fit.curve for key, fit in fits.items()})
    intra, inter = (
        fit_link(found, link, source) if (found := _of(links, within)) else link
        for link, within in ((cluster.intra, True), (cluster.inter, False))
    )
    name = name or cluster.name
    return replace(cluster, name=name, kernel=kernel, intra=intra, inter=inter), fits


def _of(links: Iterable[LinkRow], within_node: bool) -> list[LinkRow]:
    return [row for row in links if row.within_node == within_node]


def _seconds(row: TileRow, curve: Curve, peak: float) -> float:
    efficiency = curve.efficiency(row.rows, row.keys, row.head_dim)
    return curve.launch.value + row.flops / (peak * efficiency)


def _share(value: float) -> float:
    if value > 1:
        raise ClusterError(f"fit_curve: {value:.2f} of the peak; the cluster's peak is too low")
    return value


def _figure(source: str) -> Callable[[float], Figure]:
    return lambda value: Figure(float(value), Basis.MEASURED, source)


def _relative_fit(columns: Sequence[Sequence[float]], seconds: Sequence[float]) -> np.ndarray:
    """The non-negative least squares solution with every row divided by its seconds.

    At most four unknowns: every set of them that are not zero is tried.
    """
    import numpy as np

    matrix = np.array(columns) / np.array(seconds)[:, None]
    scale = np.abs(matrix).max(axis=0)  # units differ by many orders of magnitude
    scale[scale == 0] = 1.0
    matrix, ones = matrix / scale, np.ones(len(seconds))
    best, least = np.zeros(matrix.shape[1]), float("inf")
    for count in range(1, matrix.shape[1] + 1):
        for chosen in combinations(range(matrix.shape[1]), count):
            part = matrix[:, chosen]
            found = np.linalg.lstsq(part, ones, rcond=None)[0]
            error = float(((part @ found - ones) ** 2).sum())
            if (found >= 0).all() and error < least * (1 - 1e-12):
                best, least = np.zeros(matrix.shape[1]), error
                best[list(chosen)] = found
    per_feature: np.ndarray = best / scale
    return per_feature
