# SPDX-License-Identifier: Apache-2.0
"""Bytes of activations that one rank holds, as formulas: what is kept, and what comes and goes.

Counted are the tensors that autograd saves in Megatron's layers and the largest that live for a
moment beside them. Small ones (norm statistics, rotary tables, masks) are left out. A test counts
real layers against `kept_per_layer`, and the memory benchmark measures whole steps against `peak`.

Two moments of a step can be the fullest: the loss, when every layer's activations are kept and the
logits come on top, and the backward of the last layer, when what was not kept of it is there again,
with its gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

FULL = "full"
"""Megatron's own full recomputation: only a layer's input is kept."""


@dataclass(frozen=True)
class Activations:
    """One rank's share of a model and of a micro-batch.

    tokens: rows of one micro-batch on this rank, sequence times batch.
    layers: layers of this pipeline stage, times the micro-batches in flight.
    element: bytes of an activation.
    hidden, query, key_value: widths per token, of the residual stream and of this tensor-parallel
        rank's queries and keys plus values. heads: query heads of this rank.
    mlp_up, mlp_down: widths of this rank, of the first linear layer's output and of the second
        one's input; the first is twice the second in gated MLPs.
    vocabulary: logits per token on this rank; 0 on a stage without an LM head.
    shared: ranks over which TP-SP splits what lies between the linear layers; 1 without it.
    predictions: logits per token and label: more than 1 with multi-token prediction.
    sums: whether weight gradients of pieces are summed beside the gradient buffer, in fp32; not
        with gradient-accumulation fusion, which adds them to the buffer.
    split_gate: a gated activation is several operations (--no-bias-swiglu-fusion), which keep half
        of the first linear layer's output twice; Megatron's fused one keeps its input alone.
    """

    tokens: int
    layers: int
    element: int
    hidden: int
    query: int
    key_value: int
    heads: int
    mlp_up: int
    mlp_down: int
    vocabulary: int
    shared: int = 1
    predictions: int = 1
    sums: bool = True
    split_gate: bool = False

    def kept_per_layer(self, recompute: str, mlp_chunks: int = 0) -> int:
        """Bytes that a layer keeps from forward to backward for one micro-batch.

        recompute: a value of --seqpar-recompute, or `FULL`. mlp_chunks: 1 or more computes the
        MLP again in backward in any case, so only its input is kept.
        """
        residual, query, pair = self.hidden / self.shared, self.query, self.key_value
        statistics = 4 * self.heads / self.element  # log-sum-exp, fp32
        if recompute == FULL:
            elements = residual
        elif recompute == "attention-output":
            elements = residual + query + statistics
        elif recompute == "attention-qkv":
            elements = 2 * residual + 2 * query + pair + statistics
        else:
            # values are a view of the product of queries, keys and values, which stays whole
            elements = 4 * residual + 3 * query + 1.5 * pair + statistics
            if recompute == "none" and mlp_chunks == 0:
                elements += self._mlp_saved()
        return round(self.tokens * elements * self.element)

    def _mlp_saved(self) -> float:
        """Elements per token that an MLP saves."""
        gated = self.mlp_up / 2 if self.split_gate and self.mlp_up > self.mlp_down else 0
        return self.mlp_up + self.mlp_down + gated

    def layer_moment(self, recompute: str, mlp_chunks: int = 0) -> int:
        """Bytes that come and go while one layer runs backward, beside what is kept."""
        residual, pieces = self.hidden / self.shared, max(1, mlp_chunks)
        again = 0.0  # what is computed again of the attention half
        if recompute in (FULL, "attention-output", "attention-qkv"):
            whole = self.kept_per_layer("mlp") / (self.tokens * self.element)
            again = whole - self.kept_per_layer(recompute) / (self.tokens * self.element)
        mlp: float = self.mlp_up + self.mlp_down  # its gradients
        # what entered the second layer is let go before a fused activation's backward
        gone = 0 if self.split_gate else self.mlp_down
        if recompute != "none" or mlp_chunks:
            mlp += self._mlp_saved()
        mlp = (mlp - gone) / pieces
        if mlp_chunks or recompute in ("mlp", "attention-qkv"):
            mlp += residual * (1 + 1 / pieces)  # the input's whole gradient, a piece's output
        # gradients of q, k and v, summed in fp32 and then handed on in the activations' dtype
        attention = (self.query + self.key_value) * (1 + 4 / self.element) + self.query
        sums = 0.0
        if self.sums and mlp_chunks > 1:  # of both layers, and the second one's newest gradient
            sums = self.hidden * (4 * self.mlp_up + (4 + self.element) * self.mlp_down)
        widest = max(
            mlp * self.tokens * self.element + sums, attention * self.tokens * self.element
        )
        return round(self.tokens * self.element * (again + 2 * residual) + widest)

    def loss_moment(self, loss_chunks: int = 0) -> int:
        """Bytes of logits and their gradients at the fullest; 0 without an LM head.

        Logits in the activations' dtype beside the softmax in fp32, then its gradient beside
        theirs; fp32 logits become either in place. Uncut, the logits of every prediction are there
        at once. The Triton kernel needs no fp32 softmax; it is reckoned with all the same. With
        them are the last norm's input and output and the gradient of its output.
        """
        if not self.vocabulary:
            return 0
        per_logit = 4 + (0 if self.element == 4 else self.element)
        logits: float = self.tokens * self.vocabulary * per_logit
        logits = logits / loss_chunks if loss_chunks else logits * self.predictions
        states = 2 * self.hidden / self.shared + self.hidden
        if loss_chunks:
            states += self.hidden / loss_chunks
        sums = 0
        if self.sums:  # the head's newest gradient, and from two pieces on their sum
            sums = self.hidden * self.vocabulary * (self.element + 4 * (loss_chunks > 1))
        return round(logits + sums + self.tokens * states * self.element)

    def peak(self, recompute: str, mlp_chunks: int = 0, loss_chunks: int = 0) -> int:
        """Bytes of activations at the fullest moment of a step."""
        kept = self.layers * self.kept_per_layer(recompute, mlp_chunks)
        layer = self.layer_moment(recompute, mlp_chunks)
        return kept + max(layer, self.loss_moment(loss_chunks))
