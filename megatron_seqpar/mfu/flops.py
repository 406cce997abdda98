# SPDX-License-Identifier: Apache-2.0
"""What a training step counts for, and the share of the hardware's peak that it is.

The formula is PaLM's (arXiv 2204.02311, appendix B), which the Layouts study and most published
figures use. A token counts for

    6 N + 6 L Hq (dk + dv) K        FLOPs, forward and backward

N: weights that the token meets: embedding and LM head, and of a MoE layer's experts those that it
is sent to. L layers (MTP's among them), Hq query heads of dim dk (values: dv), K keys a query sees.
With dk = dv = d and no causal discount K is the sequence length s, and the second term is the
known 12 L Hq d s.

Two numbers differ in K alone:

* **MFU** takes K = s, whatever the mask hides. That is the published convention.
* **causal MFU** takes the keys that the mask leaves, (s + 1) / 2 on average. At long sequences MFU
  credits twice the attention that is computed, and exceeds what the hardware did; this one never
  does.

Recomputation counts for nothing in either. A sliding window limits K in both.
"""

from __future__ import annotations

from .model import Model


def model_flops(
    model: Model, sequence_length: int, sequences: int = 1, *, causal: bool = False
) -> float:
    """FLOPs that a step over `sequences` sequences of `sequence_length` tokens counts for.

    Of all ranks together, forward and backward. `causal` counts the keys that a causal mask leaves.
    """
    layers = model.layers + model.mtp_layers
    windowed = 0
    if model.window is not None:
        # MTP's layers are built as the first layer is
        windowed = model.window.layers(model.layers) + model.mtp_layers * model.window.first()
    keys = (layers - windowed) * _mean_keys(sequence_length, None, causal)
    if model.window:
        keys += windowed * _mean_keys(sequence_length, model.window.size, causal)
    attention = 6 * model.query_heads * (model.head_dim + model.value_head_dim) * keys
    # each MTP layer predicts with the LM head once more
    heads = model.mtp_layers * model.vocab * model.hidden
    per_token = 6 * (model.active_parameters + heads) + attention
    return per_token * sequence_length * sequences


def utilization(flops: float, seconds: float, ranks: int, peak: float) -> float:
    """Share of `ranks` devices' `peak` (FLOP/s of one) that `flops` in `seconds` is, 0 to 1."""
    return flops / (seconds * ranks * peak)


def _mean_keys(length: int, window: int | None, causal: bool) -> float:
    """Keys that a query sees, on average over a sequence's queries."""
    size = length if window is None else min(window, length)
    if not causal:
        return float(size)
    # the first `size` queries see 1, 2, ..., size keys, the others `size`
    return size - size * (size - 1) / (2 * length)
