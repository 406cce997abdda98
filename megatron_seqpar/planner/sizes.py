# SPDX-License-Identifier: Apache-2.0
"""Weights and widths of one rank's part of a model."""

from __future__ import annotations

from dataclasses import dataclass

from ..mfu import Model
from .layout import Layout


@dataclass(frozen=True)
class Widths:
    """Elements per token on one rank, in one layer.

    residual: of the residual stream and the norms, which TP-SP splits and TP alone does not.
    query, key_value, output: of queries, keys plus values, and attention's output.
    up, down: of the MLP's first product and of what enters its second, routed experts included.
    heads: query heads.
    """

    residual: float
    query: float
    key_value: float
    output: float
    up: float
    down: float
    heads: float

    @classmethod
    def of(cls, model: Model, layout: Layout) -> Widths:
        """Averages over the layers, which differ in MoE models."""
        tp = layout.tp
        kv_heads = max(model.kv_heads / tp, 1.0)
        down = mean_ffn(model) / tp
        return cls(
            residual=model.hidden / (tp if layout.tp_sp else 1),
            query=model.query_heads * model.head_dim / tp,
            key_value=kv_heads * (model.head_dim + model.value_head_dim),
            output=model.query_heads * model.value_head_dim / tp,
            up=down * (2 if model.gated else 1),
            down=down,
            heads=model.query_heads / tp,
        )


def mean_ffn(model: Model) -> float:
    """Width of the MLP that a token meets, on average over layers."""
    moe = model.moe_layers * (model.experts_per_token * model.expert_ffn + model.shared_ffn)
    return (moe + (model.layers - model.moe_layers) * model.ffn) / model.layers


@dataclass(frozen=True)
class Weights:
    """Parameters on one rank of a pipeline stage: `dense`, replicated over dp x sp, and `experts`,
    replicated over dp x sp / ep."""

    dense: float
    experts: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.dense + self.experts


def layer_weights(model: Model, layout: Layout) -> Weights:
    """Parameters of an average layer on one rank."""
    each = model.mlp_matrices * model.hidden * model.expert_ffn
    experts = model.moe_layers * model.experts * each / model.layers
    blocks = model.parameters - model.embedding_parameters
    dense = blocks / model.layers - experts
    return Weights(dense / layout.tp, experts / layout.tp / layout.ep)


def stage_weights(model: Model, layout: Layout, stage: int) -> Weights:
    """Parameters on one rank of a stage; the first holds the embedding, the last the LM head."""
    layer = layer_weights(model, layout)
    count = layout.stage_layers(model.layers)[stage]
    table = model.vocab * model.hidden / layout.tp
    ends = int(stage == 0) + int(stage == layout.pp - 1)
    if model.tied and layout.pp == 1:
        ends = 1
    return Weights(count * layer.dense + ends * table, count * layer.experts)
