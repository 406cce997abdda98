# SPDX-License-Identifier: Apache-2.0
"""Bytes of one layer and of the loss: what is kept from forward to backward, and what comes and
goes beside it.

The formulas of what a layer keeps are those of `megatron_seqpar.memory.sizes`, which a test holds
to what autograd saves; this room imports no torch and so restates them, and a test compares both.
Moments are what was alive at the fullest point of real steps, operation by operation: the backward
of a gated activation, that of attention, and the LM head's.
"""

from __future__ import annotations

from ..mfu import Model
from .constants import Constants
from .layout import Layout
from .memory_kernels import GPU, PLAIN, Kernels
from .sizes import Widths

_BATCH = 28.0  # bytes a token: three integers (token, label, position) and the loss mask
_REPEATS_ATTENTION = ("full", "attention-output", "attention-qkv")


def kernels_of(layout: Layout, kernels: Kernels | None = None) -> Kernels:
    """The kernels of a layout's layers, where nobody says otherwise."""
    return kernels or (PLAIN if layout.plain_layers else GPU)


def kept_per_layer(
    model: Model, layout: Layout, constants: Constants, kernels: Kernels | None = None
) -> float:
    """Bytes that a layer keeps from forward to backward for one micro-batch."""
    made_of = kernels_of(layout, kernels)
    kept = _kept_elements(model, layout, constants, made_of)
    per_token = layout.element * kept
    if layout.recompute in ("none", "selective", "mlp") and not layout.fused_norm:
        per_token += constants.norm_kept * Widths.of(model, layout).residual
    scores = 0.0
    if layout.recompute in ("none", "mlp"):
        scores = _scores(model, layout) * _score_bytes(layout, constants, made_of)[0]
    return layout.tokens * per_token + scores


def _kept_elements(model: Model, layout: Layout, constants: Constants, kernels: Kernels) -> float:
    """Elements per token, without scores and the study's unfused norms."""
    widths = Widths.of(model, layout)
    statistics = 4 / layout.element * widths.heads  # log-sum-exp in fp32
    if layout.recompute == "full":
        return widths.residual
    if layout.recompute == "attention-output":
        return widths.residual + widths.output + statistics
    if layout.recompute == "attention-qkv":
        kept = 2 * widths.residual + widths.query + widths.key_value + widths.output + statistics
        # a norm's output is made again, but not its copies
        return kept + 2 * _norm_copies(widths, layout, kernels) + _tables(model, layout, kernels)
    kept = _attention_half(model, layout, constants, kernels)
    if layout.recompute != "mlp" and layout.mlp_chunks == 0:
        kept += mlp_kept(widths, model, kernels)
    return kept


def _attention_half(model: Model, layout: Layout, constants: Constants, kernels: Kernels) -> float:
    """Elements per token that a layer keeps beside its MLP's, when nothing runs again."""
    widths = Widths.of(model, layout)
    kept = 4 * widths.residual + widths.query + widths.key_value + widths.output
    kept += 4 / layout.element * widths.heads  # log-sum-exp in fp32
    kept += 2 * _norm_copies(widths, layout, kernels) + _tables(model, layout, kernels)
    if not layout.plain_layers:
        # the product of queries, keys and values stays whole beside the rotated queries and keys
        return kept + widths.query + widths.key_value / 2
    return kept + (constants.copies_kept * widths.residual if layout.tp > 1 else 0.0)


def _norm_copies(widths: Widths, layout: Layout, kernels: Kernels) -> float:
    """Elements per token that a norm keeps beside input and output: in fp32 what it multiplies with
    its weight, and its input where that is not fp32."""
    copies = 1 if layout.element == 4 else 2
    return kernels.norm_copies * copies * 4 / layout.element * widths.residual


def _tables(model: Model, layout: Layout, kernels: Kernels) -> float:
    """Elements per token of sines and cosines, which sequences of a micro-batch share."""
    return kernels.rotary_tables * model.head_dim / layout.micro_batch


def mlp_kept(widths: Widths, model: Model, kernels: Kernels) -> float:
    """Elements per token that an MLP saves: its first output, and what enters its second product.

    A MoE layer keeps its tokens once more for each expert that they are sent to.
    """
    gated = widths.down if model.gated and kernels.split_gate else 0.0
    sent = model.moe_layers / model.layers * model.experts_per_token * model.hidden
    return widths.up + widths.down + gated + sent


def _scores(model: Model, layout: Layout) -> float:
    """Attention scores of one layer and micro-batch on one rank."""
    length = layout.sequence_length
    return layout.micro_batch * length * length / layout.sp * model.query_heads / layout.tp


def _score_bytes(layout: Layout, constants: Constants, kernels: Kernels) -> tuple[float, float]:
    """Bytes a score that are kept, and that come and go beside them."""
    if layout.kernel == "torch" and kernels.scores is not None:
        return kernels.scores
    if layout.kernel == "torch":
        return constants.torch_kept, constants.torch_moment
    if layout.kernel == "fused":
        return constants.fused_kept, constants.fused_kept
    return 0.0, 0.0


def layer_moment(
    model: Model, layout: Layout, constants: Constants, kernels: Kernels | None = None
) -> float:
    """Bytes that come and go while one layer runs backward, beside what is kept."""
    made_of = kernels_of(layout, kernels)
    widths = Widths.of(model, layout)
    again = 0.0
    kept, moving = _score_bytes(layout, constants, made_of)
    scores = _scores(model, layout) * moving
    if layout.recompute in (*_REPEATS_ATTENTION, "selective"):
        scores += _scores(model, layout) * kept
    if layout.recompute in _REPEATS_ATTENTION:
        again = _attention_half(model, layout, constants, made_of)
        again -= _kept_elements(model, layout, constants, made_of)
        if not layout.fused_norm:
            again += constants.norm_kept / layout.element * widths.residual
    # gradients of q, k and v, summed in fp32 and then handed on in the activations' dtype
    attention = (1 + 4 / layout.element) * (widths.query + widths.key_value) + widths.output
    # the gradient of the layer's output, and the output that was computed again or the sum of
    # gradients at the residual
    elements = again + 2 * widths.residual
    mlp = layout.tokens * layout.element * _mlp_moment(widths, model, layout, made_of)
    mlp += _weight_sums(widths, model, layout, made_of)
    passing = max(mlp, layout.tokens * layout.element * attention)
    return layout.tokens * (layout.element * elements + _BATCH) + passing + scores


def _mlp_moment(widths: Widths, model: Model, layout: Layout, kernels: Kernels) -> float:
    """Elements per token while the gradient passes an MLP's activation, and, in pieces, those of
    the whole sequence beside a piece's."""
    pieces = max(1, layout.mlp_chunks)
    repeated = layout.recompute not in ("none", "selective") or layout.mlp_chunks > 0
    gradients = widths.up + widths.down
    if kernels.split_gate:
        return (gradients + (mlp_kept(widths, model, kernels) if repeated else 0.0)) / pieces
    if kernels.halves and model.gated:
        gradients += widths.up
    # what entered the second product is let go by then
    saved = widths.up if repeated else -widths.down
    elements = (gradients + saved) / pieces
    if layout.mlp_chunks or layout.recompute in ("mlp", "attention-qkv"):
        elements += widths.residual + widths.residual / pieces  # the input's gradient, an output
    return elements


def _weight_sums(widths: Widths, model: Model, layout: Layout, kernels: Kernels) -> float:
    """Bytes of one MLP's weight gradients beside the buffer while its pieces run.

    From two pieces on they are summed in fp32, and the second matrix has a new one at that time.
    """
    if kernels.fused_gradients or layout.mlp_chunks < 2:
        return 0.0
    sums = 4.0 * (widths.up + widths.down)
    return model.hidden * (sums + layout.element * widths.down)


def gathered_tokens(model: Model, layout: Layout, kernels: Kernels | None = None) -> float:
    """Bytes for the tokens of all tensor-parallel ranks, which TP-SP brings together: the input of
    a product, gathered once more for its weight's gradient, and what reductions copy."""
    if not layout.tp_sp or layout.tp == 1:
        return 0.0
    copies = 1 + int(kernels_of(layout, kernels).copies_reduced)
    return copies * layout.tokens * layout.element * model.hidden


def loss_moment(
    model: Model, layout: Layout, constants: Constants, kernels: Kernels | None = None
) -> float:
    """Bytes of logits, softmax, their gradients and the head's at the fullest."""
    made_of = kernels_of(layout, kernels)
    pieces = max(1, layout.loss_chunks)
    vocabulary = model.vocab / (layout.tp if layout.parallel_loss else 1)
    # logits in the activations' dtype beside the softmax in fp32, then the softmax' gradient beside
    # the logits'; fp32 logits become either in place
    each = 4.0 if layout.element == 4 else 4.0 + layout.element
    if not layout.fused_loss:
        each = constants.logit_bytes
    if layout.tp > 1 and not layout.parallel_loss:
        each += constants.gather_bytes
    widths = Widths.of(model, layout)
    # the last norm's input, output and copies, and the gradient of its output
    hidden = 2 * widths.residual + _norm_copies(widths, layout, made_of) + model.hidden
    if layout.loss_chunks:
        hidden += model.hidden / pieces
    head = 0.0
    if not made_of.fused_gradients:
        head = layout.element + (4.0 if layout.loss_chunks > 1 else 0.0)
    return (
        layout.tokens * (vocabulary * each / pieces + layout.element * hidden + _BATCH)
        + head * model.hidden * model.vocab / layout.tp
    )
