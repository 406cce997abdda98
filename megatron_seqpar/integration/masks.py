# SPDX-License-Identifier: Apache-2.0
"""Which tokens attend to which in each layer of a Megatron model.

A layer's mask comes from three places: the mask type its spec gives it (causal or none),
Megatron's sliding window (`--window-size`, for the layers that `--window-attn-skip-freq` does not
leave out), and `--seqpar-mask`, which takes the causal mask's place.

Note: what Megatron's window sizes mean
---------------------------------------
`--window-size left,right` lets a token see `left` tokens before it and `right` after it, itself
apart; -1 is documented as "no limit". The two stock attentions differ in what a causal layer makes
of `right`: Transformer Engine cuts at the token itself, whatever `right` is, and the local
attention lets every token see `right` tokens ahead. Each is followed where it is replaced. The
local attention also takes -1 for a number, so that a token does not see itself; here -1 is no
limit, and no look ahead in a causal layer.
"""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.utils import is_layer_window_attention

from megatron_seqpar.attention import Mask
from megatron_seqpar.attention.masks import Causal, Full, SlidingWindow, as_mask
from megatron_seqpar.errors import UnsupportedError
from megatron_seqpar.integration import state

SERVED = (AttnMaskType.causal, AttnMaskType.no_mask)
"""The mask types that say what the mask is, without a tensor."""


def of_layer(source: Any, layer_number: int, kind: AttnMaskType | None) -> Mask:
    """The mask of one layer over a whole sequence (or over each packed document).

    source: a `TransformerConfig` or an argument namespace, for the sliding window and, in
        `transformer_impl`, the stock attention whose place ours takes.
    layer_number: counted from 1 over the whole model, as Megatron does.
    kind: the layer's mask type.
    Raises `UnsupportedError` for mask types that need a tensor.
    """
    if kind not in SERVED:
        name = getattr(kind, "name", kind)
        raise UnsupportedError(
            f"attn_mask_type {name} with {state.context(state.config())}: masks given as "
            f"tensors are not split over the axis; use {' or '.join(one.name for one in SERVED)}."
        )
    causal = kind == AttnMaskType.causal
    size = getattr(source, "window_size", None)
    skipped = getattr(source, "window_attn_skip_freq", None)
    if size and is_layer_window_attention(size, skipped, layer_number):
        left, right = size
        if causal and getattr(source, "transformer_impl", None) != "local":
            right = 0
        return _window(left, right, causal)
    return as_mask(state.config().mask) if causal else Full()


def _window(left: int, right: int, causal: bool) -> Mask:
    """A window, or the simpler mask that it comes to."""
    if causal:
        right = max(right, 0)
    if left < 0 and right <= 0:
        return Causal() if right == 0 else Full()
    return SlidingWindow(left, right)


def of_model(args: Any) -> tuple[Mask, ...]:
    """The different masks of a causal model's layers, in the order they first appear.

    args: Megatron's argument namespace.
    """
    layers = range(1, (args.num_layers or 1) + 1)
    found = (of_layer(args, number, AttnMaskType.causal) for number in layers)
    return tuple(dict.fromkeys(found))
