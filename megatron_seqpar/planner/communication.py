# SPDX-License-Identifier: Apache-2.0
"""Seconds that collectives of the tensor, expert, pipeline and data axes take.

Ranks are numbered as Megatron does: tensor axis innermost, then SP, data and pipeline. A ring
collective over n ranks moves (n - 1) / n of the data through every rank's port.
"""

from __future__ import annotations

from ..mfu import Model
from .compute import repeats
from .hardware import Cluster
from .layout import Layout
from .sizes import layer_weights, stage_weights
from .squeeze import squeeze

_ELEMENT = 2


def tensor_time(model: Model, cluster: Cluster, layout: Layout) -> float:
    """All-reduces of one layer and micro-batch (with TP-SP as gathers and reduce-scatters)."""
    tp = layout.tp
    if tp == 1:
        return 0.0
    attention_again, mlp_again, _ = repeats(layout)
    # one all-reduce a half layer and pass; the second half's is not run again for its output
    reductions = 4 + float(attention_again == 1.0) + mlp_again
    size = layout.tokens * model.hidden * _ELEMENT
    return reductions * _all_reduce(cluster, tp, size)


def tensor_head_time(model: Model, cluster: Cluster, layout: Layout) -> float:
    """Collectives of the LM head and the loss of one micro-batch."""
    if layout.tp == 1:
        return 0.0
    size = layout.tokens * model.hidden * _ELEMENT
    time = _all_reduce(cluster, layout.tp, size)
    if not layout.parallel_loss:  # logits are gathered
        time += _all_reduce(cluster, layout.tp, layout.tokens * model.vocab * _ELEMENT) / 2
    return time


def _all_reduce(cluster: Cluster, ranks: int, size: float) -> float:
    constants = cluster.constants
    rate = cluster.collective(ranks, constants.tp_bandwidth)
    return 2 * (ranks - 1) / ranks * size / rate + constants.tp_latency


def expert_time(model: Model, cluster: Cluster, layout: Layout) -> float:
    """All-to-alls of one average layer and micro-batch: there and back, both passes."""
    if layout.ep == 1:
        return 0.0
    exchanges = 4 + 2 * repeats(layout)[1]
    size = layout.tokens * model.experts_per_token * model.hidden * _ELEMENT
    size *= (layout.ep - 1) / layout.ep / (layout.tp if layout.tp_sp else 1)
    span = layout.ep * layout.tp
    seconds = cluster.latency(span) + size / cluster.point_to_point(span)
    return exchanges * seconds * model.moe_layers / model.layers


def pipeline_time(model: Model, cluster: Cluster, layout: Layout) -> float:
    """Activations there and gradients back between two stages, one micro-batch."""
    if layout.pp == 1:
        return 0.0
    size = layout.tokens * model.hidden * _ELEMENT / (layout.tp if layout.tp_sp else 1)
    stride = layout.tp * layout.sp * layout.dp
    span = stride * layout.pp
    return 2 * layout.vpp * (cluster.latency(span) + size / cluster.point_to_point(span))


def data_time(model: Model, cluster: Cluster, layout: Layout) -> float:
    """Reducing gradients and, sharded, gathering weights of a step, if nothing hid it."""
    weights = max(
        (stage_weights(model, layout, stage) for stage in (0, layout.pp - 1)),
        key=lambda each: each.total,
    )
    replicas = layout.replicas
    time = _reduction(cluster, layout, weights.dense, replicas)
    time += _reduction(cluster, layout, weights.experts, replicas // layout.ep)
    time *= 1 + cluster.constants.dp_squeeze * squeeze(model, cluster, layout)
    if layout.zero >= 3:  # weights are gathered for forward and again for backward
        whole = layer_weights(model, layout).total * model.layers * _ELEMENT
        rate = _data_rate(cluster, layout, replicas)
        time += 2 * layout.micro_batches * whole * (replicas - 1) / replicas / rate
    return time


def _reduction(cluster: Cluster, layout: Layout, weights: float, replicas: int) -> float:
    if replicas == 1 or weights == 0:
        return 0.0
    there = layout.gradient_bytes
    back = _ELEMENT if layout.zero else layout.gradient_bytes
    if layout.zero >= 3:
        back = 0  # weights stay sharded
    size = weights * (there + back) * (replicas - 1) / replicas
    return size / _data_rate(cluster, layout, replicas)


def _data_rate(cluster: Cluster, layout: Layout, replicas: int) -> float:
    """Bytes/s through each rank of the data-parallel ring; long rings do worse."""
    constants = cluster.constants
    if replicas * layout.tp <= cluster.node_size:
        return cluster.machine.intra.bandwidth
    local = max(1, cluster.node_size // layout.tp)
    rate = cluster.ring(local, constants.dp_bandwidth)
    return rate / (1 + constants.dp_contention * (replicas - 1))
