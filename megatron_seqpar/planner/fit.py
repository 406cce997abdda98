# SPDX-License-Identifier: Apache-2.0
"""Fitting the free constants to measured runs: least squares in log space, with priors.

Time: the residual of a run is log(predicted / measured) over a noise, that of a constant
log(value / prior) over its spread. Runs far off count less (a Cauchy weight), since some were
disturbed. Memory: a run tells only on which side of the capacity it lies, so a logistic loss of
log(predicted / capacity) takes the place of the residual; it pushes the boundary between runs that
fitted and runs that did not, and to the middle of the gap where they are apart. Needs numpy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import SeqParError
from .constants import Basis, Constants, prior_of
from .estimate import peak_memory, step_time
from .hardware import Cluster, Origin
from .runs import Run

_NOISE = 0.02  # of log step time: what the form of the model leaves, not the clock
_WIDTH = 0.03  # of log memory, over which fitting turns into not fitting
_STEPS = 40


@dataclass(frozen=True)
class Fit:
    """A cluster with fitted constants, and what they were fitted to."""

    cluster: Cluster
    timed: int
    decided: int


def calibrate(cluster: Cluster, runs: Sequence[Run], source: str, fixed: Sequence[str] = ()) -> Fit:
    """Fit the constants of `cluster` to `runs`; `fixed` ones keep their values.

    Where the cluster's file assumes a value, that is the centre of the prior; values that were
    calibrated before are forgotten. Raises SeqParError when no run is of use.
    """
    centres = {
        name: getattr(cluster.constants, name)
        for name, origin in cluster.origins.items()
        if origin.basis is not Basis.CALIBRATED
    }
    usable = [run for run in runs if run.problem is None]
    timed = [run for run in usable if run.ok]
    decided = [run for run in usable if run.decided]
    if not decided:
        raise SeqParError("calibrate: no row with status ok or oom whose layout is possible")
    origin = Origin(Basis.CALIBRATED, source)
    # memory first: times depend on how much of it is free
    names = [name for name in Constants.names("memory") if name not in fixed]
    values = solve(cluster, names, lambda made: _memory_residuals(made, decided), centres=centres)
    if timed:
        sized = replace(cluster, constants=cluster.constants.changed(values))
        names = [name for name in _used(timed) if name not in fixed]
        values |= solve(sized, names, lambda made: _time_residuals(made, timed), centres=centres)
    origins = {**cluster.origins, **dict.fromkeys(values, origin)}
    fitted = replace(cluster, constants=cluster.constants.changed(values), origins=origins)
    return Fit(fitted, len(timed), len(decided))


def _used(runs: Sequence[Run]) -> list[str]:
    """Time constants that some run depends on; the others would only keep their priors."""
    unused = set()
    layouts = [run.layout for run in runs]
    for name, kernel in (
        ("flash1_speed", "flash1"), ("flash2_speed", "flash2"),
        ("fused_traffic", "fused"), ("torch_traffic", "torch"),
    ):  # fmt: skip
        if not any(layout.kernel == kernel for layout in layouts):
            unused.add(name)
    if not any(layout.overlap_dp for layout in layouts):
        unused.add("dp_exposed")
    if not any(layout.copied_reduction for layout in layouts):
        unused.add("dp_squeeze")
    if all(layout.tp == 1 for layout in layouts):
        unused |= {"tp_bandwidth", "tp_latency"}
    if all(layout.pp == 1 for layout in layouts):
        unused.add("pp_overhead")
    if all(layout.fused_norm for layout in layouts):
        unused.add("norm_traffic")
    return [name for name in Constants.names("time") if name not in unused]


def _time_residuals(cluster: Cluster, runs: Sequence[Run]) -> list[float]:
    residuals = []
    for run in runs:
        predicted = step_time(run.model, cluster, run.layout).total
        off = math.log(predicted / run.step_time) / _NOISE
        # sum of squares of these is that of Cauchy's loss
        residuals.append(math.copysign(math.sqrt(4 * math.log1p(off * off / 4)), off))
    return residuals


def _memory_residuals(cluster: Cluster, runs: Sequence[Run]) -> list[float]:
    residuals = []
    for run in runs:
        over = math.log(peak_memory(run.model, cluster, run.layout) / cluster.capacity.value)
        wrong = (over if run.status == "ok" else -over) / _WIDTH
        loss = wrong + math.log1p(math.exp(-wrong)) if wrong > 0 else math.log1p(math.exp(wrong))
        residuals.append(math.sqrt(2 * loss))
    return residuals


def solve(
    cluster: Cluster,
    names: Sequence[str],
    residuals: Callable[[Cluster], list[float]],
    spreads_of: Mapping[str, float] | None = None,
    centres: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Values of the constants `names` with the least sum of squares, from their priors.

    `residuals` are those of the runs under a cluster with tried constants; `spreads_of` and
    `centres` replace spreads and values of priors. By Levenberg and Marquardt's method.
    """
    import numpy as np

    known = centres or {}
    start = np.log([known.get(name, prior_of(name)[0]) for name in names])
    wider = spreads_of or {}
    spreads = np.array([wider.get(name, prior_of(name)[1]) for name in names])

    def vector(logs: Any) -> Any:
        values = {name: float(v) for name, v in zip(names, np.exp(logs), strict=True)}
        made = replace(cluster, constants=cluster.constants.changed(values))
        return np.array([*residuals(made), *((logs - start) / spreads)])

    logs, damping = start.copy(), 1e-2
    current = vector(logs)
    for _ in range(_STEPS):
        step = 1e-4
        slopes = np.stack(
            [(vector(logs + step * unit) - current) / step for unit in np.eye(len(names))], axis=1
        )
        normal, gradient = slopes.T @ slopes, slopes.T @ current
        improved = False
        for _ in range(8):
            move = -np.linalg.solve(normal + damping * np.diag(np.diag(normal)), gradient)
            move = np.clip(move, -0.7, 0.7)
            tried = vector(logs + move)
            if tried @ tried < current @ current:
                improved = True
                gain = 1 - (tried @ tried) / (current @ current)
                logs, current, damping = logs + move, tried, damping / 5
                break
            damping *= 4
        if not improved or gain < 1e-7:
            break
    return {name: float(value) for name, value in zip(names, np.exp(logs), strict=True)}
