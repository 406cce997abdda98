# SPDX-License-Identifier: Apache-2.0
"""DISTFLASHATTN's comparisons, simulated: published cells beside predicted ones, and more cells.

The same step model as everywhere in the planner, with a layout for each method. Constants are
those of configs/planner/lightseq.yaml, which `fit_anchors` made from `ANCHORS` alone; everything
else follows. Heads that TP or Ulysses cannot share out are padded, as the paper pads them: the
ranks compute for heads that are not there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..mfu import Model, load_model
from .constants import Basis
from .constants_file import model_folder
from .estimate import StepTime, step_time
from .hardware import Cluster, Origin
from .layout import Layout
from .lightseq_cells import ANCHORS, Cell, Method

MODELS = ("llama2-7b", "llama2-7b-gqa", "llama2-33-heads")
FITTED = {"gemm_share": 0.15, "flash2_speed": 0.3, "wide_traffic": 0.5, "tp_bandwidth": 0.1}
"""Constants that the anchors can tell apart, with the spreads of their priors: the paper's kernels
and layers are not those that the priors are of."""
_NOISE = 0.02


@dataclass(frozen=True)
class Simulated:
    """A cell of the comparison; `published` where it is an anchor."""

    model: str
    ranks: int
    thousands: int
    method: Method
    time: StepTime
    published: float | None

    @property
    def error(self) -> float | None:
        """Predicted over published, minus 1."""
        return None if self.published is None else self.time.total / self.published - 1


def named_model(name: str) -> Model:
    """A model of configs/models."""
    return load_model(model_folder() / f"{name}.yaml")


def layout_of(method: Method, ranks: int, length: int) -> Layout:
    """The layout of a method over all ranks, one sequence a step.

    Megatron shards optimizer state (there is one replica, so nothing); the others shard weights,
    gradients and optimizer state over the ranks as FSDP does.
    """
    plain = Layout(length, 1, micro_batch=1, gradient_bytes=2)
    if method is Method.MEGATRON:
        return replace(plain, tp=ranks, tp_sp=True, recompute="full")
    split = replace(plain, sp=ranks, zero=3)
    if method is Method.ULYSSES:
        return replace(split, schedule="ulysses", recompute="full")
    if method is Method.FULL:
        return replace(split, schedule="distflashattn", recompute="full")
    if method is Method.DISTFLASHATTN:
        return replace(split, schedule="distflashattn", recompute="attention-output")
    return replace(split, recompute="attention-output", schedule="balanced")


def padded(model: Model, method: Method, ranks: int) -> Model:
    """The model with the heads that a method must pad to."""
    if method not in (Method.MEGATRON, Method.ULYSSES):
        return model
    heads = -(-model.query_heads // ranks) * ranks
    if heads == model.query_heads:
        return model
    grown = heads / model.query_heads
    kv = heads if model.kv_heads == model.query_heads else model.kv_heads
    return replace(
        model,
        query_heads=heads,
        kv_heads=kv,
        attention_parameters=round(model.attention_parameters * grown),
    )


def simulate_cell(
    cluster: Cluster, name: str, ranks: int, thousands: int, method: Method
) -> StepTime:
    """Seconds of a step by part."""
    model = padded(named_model(name), method, ranks)
    return step_time(model, cluster, layout_of(method, ranks, thousands * 1024))


def fit_anchors(cluster: Cluster, cells: Sequence[Cell] = ANCHORS) -> Cluster:
    """The cluster with constants fitted to published cells; needs numpy."""
    from .fit import solve

    def residuals(made: Cluster) -> list[float]:
        return [math.log(1 + (each.error or 0.0)) / _NOISE for each in anchors(made, cells)]

    values = solve(cluster, list(FITTED), residuals, FITTED)
    origin = Origin(Basis.CALIBRATED, f"{len(cells)} published cells of arXiv 2310.03294")
    origins = {**cluster.origins, **dict.fromkeys(values, origin)}
    return replace(cluster, constants=cluster.constants.changed(values), origins=origins)


def anchors(cluster: Cluster, cells: Sequence[Cell] = ANCHORS) -> list[Simulated]:
    """The published cells, predicted."""
    return [
        Simulated(
            cell.model,
            cell.ranks,
            cell.thousands,
            cell.method,
            simulate_cell(cluster, cell.model, cell.ranks, cell.thousands, cell.method),
            cell.seconds,
        )
        for cell in cells
    ]


def table(cluster: Cluster, methods: Sequence[Method] = tuple(Method)) -> list[Simulated]:
    """Every model, 8 and 16 ranks, 8K to 32K tokens a rank; published where it is an anchor."""
    known = {(c.model, c.ranks, c.thousands, c.method): c.seconds for c in ANCHORS}
    return [
        Simulated(
            name,
            ranks,
            ranks * each,
            method,
            simulate_cell(cluster, name, ranks, ranks * each, method),
            known.get((name, ranks, ranks * each, method)),
        )
        for name in MODELS
        for ranks in (8, 16)
        for each in (8, 16, 32)
        for method in methods
    ]
