# SPDX-License-Identifier: Apache-2.0
"""What layers are made of, as far as memory goes: plainer kernels keep more."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kernels:
    """What operations between matrix products keep, and make for a moment.

    Attributes:
        split_gate: a gated activation is several operations, and keeps half of its input twice.
            Else it is one, which keeps its input alone.
        halves: its backward makes the two halves of its gradient before it joins them.
        norm_copies: what a norm keeps in fp32 beside its input and its output: 0 nothing, 1 what
            its plain operations keep.
        rotary_tables: head sizes that a layer keeps for each position, as sines and cosines.
        fused_gradients: gradients of weights are added to the gradient buffer by the product that
            makes them. Else each exists beside the buffer for a moment.
        copies_reduced: what is reduced and scattered over ranks is copied first.
        scores: bytes a score that plain softmax attention keeps, and that come and go in its
            backward; None where they are fitted constants.
    """

    split_gate: bool
    halves: bool
    norm_copies: int
    rotary_tables: int
    fused_gradients: bool
    copies_reduced: bool = False
    scores: tuple[float, float] | None = None


GPU = Kernels(split_gate=False, halves=False, norm_copies=0, rotary_tables=0, fused_gradients=True)
"""Megatron's own defaults with Transformer Engine: fused SwiGLU, norms, rotary embedding."""

CPU = Kernels(
    split_gate=False,
    halves=True,
    norm_copies=1,
    rotary_tables=4,
    fused_gradients=False,
    copies_reduced=True,
    scores=(4.0, 12.0),  # fp32: probabilities; their gradient, the scores', and the masked ones'
)
"""Megatron's local layers in torch's CPU kernels, over gloo, as the CPU runtime trains them."""

PLAIN = Kernels(split_gate=True, halves=False, norm_copies=0, rotary_tables=0, fused_gradients=True)
"""The layers of the Layouts study; what its runs show beyond that is in the fitted constants."""
