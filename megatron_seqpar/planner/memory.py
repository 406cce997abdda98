# SPDX-License-Identifier: Apache-2.0
"""Bytes that one rank of a pipeline stage holds at the fullest moment of a step, by component.

The formulas of what a layer keeps are those of `megatron_seqpar.memory.sizes`, which a test holds
to what autograd saves; this room imports no torch and so restates them, and a test compares both.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from ..mfu import Model
from .constants import Constants
from .layout import Layout
from .sizes import Widths, layer_weights, stage_weights

_OPTIMIZER = {2: 12, 4: 8}  # Adam's two moments, and the fp32 weight where it is not the weight


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank by component.

    activations: what layers keep for the micro-batches in flight, attention scores included.
    moment: the larger of one layer's backward and the loss, whichever comes on top.
    context: what the process takes before anything is allocated.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    moment: float
    context: float

    @property
    def total(self) -> float:
        """Their sum."""
        return float(sum(self.parts().values()))

    def parts(self) -> dict[str, float]:
        """Bytes by component."""
        return {f.name: float(getattr(self, f.name)) for f in fields(self)}


def in_flight(layout: Layout, stage: int) -> float:
    """Micro-batches' worth of a whole stage's activations that a rank holds at once.

    1F1B: as many as there are stages from this one on. Interleaved, a rank holds chunks of
    1/vpp of a stage, of which the warm-up runs 2 per later stage and pp per further chunk.
    """
    behind = layout.pp - stage
    if layout.vpp == 1:
        return min(behind, layout.micro_batches)
    chunks = 2 * (behind - 1) + (layout.vpp - 1) * layout.pp + 1
    return min(chunks, layout.micro_batches * layout.vpp) / layout.vpp


def kept_per_layer(model: Model, layout: Layout, constants: Constants) -> float:
    """Bytes that a layer keeps from forward to backward for one micro-batch."""
    per_token = layout.element * _kept_elements(Widths.of(model, layout), layout, model, constants)
    if layout.recompute in ("none", "selective", "mlp") and not layout.fused_norm:
        per_token += constants.norm_kept * Widths.of(model, layout).residual
    scores = 0.0
    if layout.recompute in ("none", "mlp"):
        scores = _scores(model, layout) * _score_bytes(layout, constants)[0]
    return layout.tokens * per_token + scores


def _kept_elements(widths: Widths, layout: Layout, model: Model, constants: Constants) -> float:
    """Elements per token, without scores and unfused norms."""
    statistics = 4 / layout.element * widths.heads  # log-sum-exp in fp32
    if layout.recompute == "full":
        return widths.residual
    if layout.recompute == "attention-output":
        return widths.residual + widths.output + statistics
    if layout.recompute == "attention-qkv":
        return 2 * widths.residual + widths.query + widths.key_value + widths.output + statistics
    kept = _attention_half(widths, layout, constants)
    if layout.recompute != "mlp" and layout.mlp_chunks == 0:
        kept += mlp_kept(widths, model)
    return kept


def _attention_half(widths: Widths, layout: Layout, constants: Constants) -> float:
    """Elements per token that a layer keeps beside its MLP's, when nothing runs again."""
    kept = 4 * widths.residual + widths.query + widths.key_value + widths.output
    kept += 4 / layout.element * widths.heads  # log-sum-exp in fp32
    if not layout.plain_layers:
        # the product of queries, keys and values stays whole beside the rotated queries and keys
        return kept + widths.query + widths.key_value / 2
    return kept + (constants.copies_kept * widths.residual if layout.tp > 1 else 0.0)


def mlp_kept(widths: Widths, model: Model) -> float:
    """Elements per token that an MLP saves; a gated one has half of its first output twice.

    A MoE layer keeps its tokens once more for each expert that they are sent to.
    """
    gated = widths.down if model.gated else 0.0
    sent = model.moe_layers / model.layers * model.experts_per_token * model.hidden
    return widths.up + widths.down + gated + sent


def _scores(model: Model, layout: Layout) -> float:
    """Attention scores of one layer and micro-batch on one rank."""
    length = layout.sequence_length
    return layout.micro_batch * length * length / layout.sp * model.query_heads / layout.tp


def _score_bytes(layout: Layout, constants: Constants) -> tuple[float, float]:
    """Bytes a score that are kept, and that come and go beside them."""
    if layout.kernel == "torch":
        return constants.torch_kept, constants.torch_moment
    if layout.kernel == "fused":
        return constants.fused_kept, constants.fused_kept
    return 0.0, 0.0


def layer_moment(model: Model, layout: Layout, constants: Constants) -> float:
    """Bytes that come and go while one layer runs backward, beside what is kept."""
    widths = Widths.of(model, layout)
    pieces = max(1, layout.mlp_chunks)
    again = 0.0
    kept, moving = _score_bytes(layout, constants)
    scores = _scores(model, layout) * moving
    if layout.recompute in ("full", "attention-output", "attention-qkv", "selective"):
        scores += _scores(model, layout) * kept
    if layout.recompute in ("full", "attention-output", "attention-qkv"):
        again = _attention_half(widths, layout, constants)
        again -= _kept_elements(widths, layout, model, constants)
        if not layout.fused_norm:
            again += constants.norm_kept / layout.element * widths.residual
    mlp = (widths.up + widths.down) / pieces
    if layout.recompute not in ("none", "selective") or layout.mlp_chunks:
        mlp += mlp_kept(widths, model) / pieces
    # gradients of q, k and v, summed in fp32 and then handed on in the activations' dtype
    attention = (1 + 4 / layout.element) * (widths.query + widths.key_value) + widths.output
    elements = again + 2 * widths.residual + max(mlp, attention)
    return layout.tokens * layout.element * elements + scores


def loss_moment(model: Model, layout: Layout, constants: Constants) -> float:
    """Bytes of logits, softmax and their gradients at the fullest."""
    logits = layout.tokens * model.vocab / (layout.tp if layout.parallel_loss else 1)
    # logits and gradients in the activations' dtype, the softmax in fp32; fp32 logits become it
    each = 4.0 if layout.element == 4 else 8.0
    if not layout.fused_loss:
        each = constants.logit_bytes
    if layout.tp > 1 and not layout.parallel_loss:
        each += constants.gather_bytes
    return (
        logits * each / max(1, layout.loss_chunks) + layout.tokens * model.hidden * layout.element
    )


def stage_memory(model: Model, layout: Layout, constants: Constants, stage: int) -> Memory:
    """Bytes of one rank of a pipeline stage, counted from 0."""
    weights = stage_weights(model, layout, stage)
    replicas, expert_replicas = layout.replicas, layout.replicas / layout.ep
    zero = layout.zero

    def held(each: float, sharded: bool) -> float:
        if not sharded:
            return each * weights.total
        return each * (weights.dense / replicas + weights.experts / expert_replicas)

    gathered = 0.0
    if zero >= 3:  # two layers' weights are whole at a time
        gathered = 2 * layout.element * layer_weights(model, layout).total
    if zero >= 2:
        gathered += 2 * layout.gradient_bytes * layer_weights(model, layout).total
    layers = layout.stage_layers(model.layers)[stage]
    flight = in_flight(layout, stage)
    if stage < layout.pp - 1:
        flight += constants.flight_slack
    kept = kept_per_layer(model, layout, constants) * layers * flight
    moment = layer_moment(model, layout, constants)
    if stage == layout.pp - 1:
        moment = max(moment, loss_moment(model, layout, constants))
    return Memory(
        weights=held(layout.element, zero >= 3),
        gradients=held(layout.gradient_bytes, zero >= 2),
        optimizer=held(_OPTIMIZER[layout.element], zero >= 1),
        activations=kept * constants.activation_slack,
        moment=(moment + gathered) * constants.activation_slack,
        context=constants.context_bytes,
    )


def stages(layout: Layout) -> tuple[int, ...]:
    """First, middle and last stage: the ones that can be the fullest."""
    return tuple(sorted({0, layout.pp // 2, layout.pp - 1}))
