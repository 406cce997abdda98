# SPDX-License-Identifier: Apache-2.0
"""Seconds that one rank computes for a layer, for the LM head, and for the optimizer.

    product of (m, k) and (k, n)   2 m n k / (peak x share) x (1 + half x (1/m + 1/n + 1/k))

A product that is thin in a dimension moves more bytes for its FLOPs and fills the processors
worse: both cost in proportion to 1/m + 1/n + 1/k. Backward is two such products. What is not a
product is bytes over the memory's bandwidth, and a constant for launches.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..mfu import Model
from .attention import attention_time
from .hardware import Cluster
from .layout import Layout
from .sizes import Widths, layer_weights, stage_weights

_ROTARY = 16.0  # bytes per element of queries and keys, both passes
_GATE = 28.0  # bytes per element of a gated activation, both passes
_PLAIN = 12.0  # of a plain one
_FORWARD_SHARE = 0.4  # of the traffic of both passes
_OPTIMIZER_TRAFFIC = 34.0  # bytes a parameter: gradient, fp32 weight and two moments, weight


@dataclass(frozen=True)
class LayerTime:
    """Seconds of one layer and micro-batch, both passes and what is computed again.

    gemm: matrix products. attention: kernels. elementwise: norms, residuals, rotary embedding,
    activation. overhead: launches. sp: waiting for transfers of the SP axis.
    """

    gemm: float
    attention: float
    elementwise: float
    overhead: float
    sp: float

    @property
    def compute(self) -> float:
        """All but waiting."""
        return self.gemm + self.attention + self.elementwise + self.overhead


def repeats(layout: Layout) -> tuple[float, float, bool]:
    """Shares of the attention half's and the MLP's forward products that run again, and whether
    attention itself does."""
    mlp = 1.0 if layout.mlp_chunks else 0.0
    if layout.recompute == "full":
        return 1.0, 1.0, True
    if layout.recompute == "selective":
        return 0.0, mlp, True
    if layout.recompute == "attention-output":
        return 1.0, 1.0, False
    if layout.recompute == "attention-qkv":
        return 0.25, 1.0, False
    return 0.0, (1.0 if layout.recompute == "mlp" else mlp), False


def gemm_seconds(cluster: Cluster, m: float, n: float, k: float) -> float:
    """One matrix product."""
    constants = cluster.constants
    thin = 1 + constants.gemm_half * (1 / m + 1 / n + 1 / k)
    return 2 * m * n * k / (cluster.peak * constants.gemm_share) * thin


def layer_time(model: Model, cluster: Cluster, layout: Layout) -> LayerTime:
    """One average layer and micro-batch."""
    attention_again, mlp_again, core_again = repeats(layout)
    widths = Widths.of(model, layout)
    gemm = (3 + attention_again) * _attention_gemms(model, cluster, layout, widths)
    gemm += (3 + mlp_again) * _mlp_gemms(model, cluster, layout)
    forward = attention_time(model, cluster, layout, "forward")
    core = forward + attention_time(model, cluster, layout, "backward")
    if core_again:
        core = core + forward
    again = _FORWARD_SHARE * (attention_again + mlp_again) / 2
    return LayerTime(
        gemm=gemm,
        attention=core.compute,
        elementwise=(1 + again) * _elementwise(model, cluster, layout, widths),
        overhead=cluster.constants.layer_overhead * (1 + (attention_again + mlp_again) / 6),
        sp=core.exposed,
    )


def _attention_gemms(model: Model, cluster: Cluster, layout: Layout, widths: Widths) -> float:
    """Forward products of queries, keys, values and output."""
    weights = model.attention_parameters / layout.tp
    into = widths.query + widths.key_value
    out = widths.output
    # weights beyond those four (latent projections, gates) run as the input's product does
    inward = max(weights - out * model.hidden, into * 1.0) / model.hidden
    tokens = layout.tokens
    return gemm_seconds(cluster, tokens, inward, model.hidden) + gemm_seconds(
        cluster, tokens, model.hidden, out
    )


def _mlp_gemms(model: Model, cluster: Cluster, layout: Layout) -> float:
    """Forward products of the MLP, mean over dense and MoE layers."""
    factor = 2 if model.gated else 1
    tokens = layout.tokens / max(1, layout.mlp_chunks)

    def mlp(rows: float, width: float) -> float:
        up = gemm_seconds(cluster, rows, factor * width, model.hidden)
        return up + gemm_seconds(cluster, rows, model.hidden, width)

    dense_layers = model.layers - model.moe_layers
    total = 0.0
    if dense_layers:
        total += dense_layers * mlp(tokens, model.ffn / layout.tp)
    if model.moe_layers:
        # a rank holds experts / ep of them and gets that share of ep ranks' tokens
        local = model.experts / layout.ep
        rows = tokens * model.experts_per_token * layout.ep / model.experts
        moe = local * mlp(rows, model.expert_ffn / layout.tp)
        if model.shared_ffn:
            moe += mlp(tokens, model.shared_ffn / layout.tp)
        total += model.moe_layers * moe
    return total * max(1, layout.mlp_chunks) / model.layers


def _elementwise(model: Model, cluster: Cluster, layout: Layout, widths: Widths) -> float:
    """Both passes."""
    constants = cluster.constants
    wide = constants.wide_traffic + (0.0 if layout.fused_norm else constants.norm_traffic)
    gate = _GATE if model.gated else _PLAIN
    narrow = _ROTARY * (widths.query + widths.key_value / 2) + gate * widths.down
    moved = layout.tokens * (wide * widths.residual + constants.narrow_traffic * narrow)
    return moved / cluster.machine.device.memory.value


def head_time(model: Model, cluster: Cluster, layout: Layout) -> float:
    """LM head and loss of one micro-batch, both passes."""
    share = layout.tp if layout.parallel_loss else 1
    products = 3 + (1 if layout.loss_chunks else 0)
    time = products * gemm_seconds(cluster, layout.tokens, model.vocab / layout.tp, model.hidden)
    logits = layout.tokens * model.vocab / share
    time += logits * cluster.constants.loss_traffic / cluster.machine.device.memory.value
    return time * (1 + model.mtp_layers)


def optimizer_time(model: Model, cluster: Cluster, layout: Layout) -> float:
    """Adam over this rank's share of the fullest stage."""
    weights = stage_weights(model, layout, 0)
    count = weights.total
    if layout.zero:
        count = weights.dense / layout.replicas + weights.experts * layout.ep / layout.replicas
    return count * _OPTIMIZER_TRAFFIC / cluster.machine.device.memory.value


def weights_of_layer(model: Model, layout: Layout) -> float:
    """Parameters of a layer on one rank."""
    return layer_weights(model, layout).total
