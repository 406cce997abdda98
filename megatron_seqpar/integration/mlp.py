# SPDX-License-Identifier: Apache-2.0
"""Megatron's MLP in pieces of the sequence (Mini-Sequence Transformer, arXiv 2407.15892, 3.2).

Every MLP of the model that sees all tokens of a layer goes through `MLP.forward`, whatever the
layer spec: those of GPT and hybrid layers, of MTP heads, of the dense layers of a mixture of
experts, and its shared experts. The patch runs the stock forward on one piece of the sequence at a
time (`memory.chunked`), so the `[s, b, ffn]` activations exist for one piece only. Modules,
parameters and checkpoints stay as they are. Routed experts do not come through here with tokens to
cut: theirs are dispatched already.

With `--seqpar-recompute mlp` and `attention-qkv` the same function recomputes the MLP, in one
piece if no number is given.

Under tensor parallelism a piece of n rows is n rows of every rank: with TP-SP its gather and its
reduce-scatter carry rows of all ranks that are no neighbours in the sequence, which an MLP does
not notice. Each collective becomes one a piece, and their bytes together stay the same. All TP
ranks hold as many rows and so cut alike.

**A recomputed layer.** With `--seqpar-recompute attention-output` a layer runs again in backward,
and the MLP's pieces run again after it: the MLP's output in between serves only the sum with the
residual, whose gradient does not depend on it. So in the repeated layer the MLP computes nothing;
each piece runs once in forward and once in backward. Where something might read that output (a
layer that overrides what follows the MLP, another function than Megatron's bias-dropout-add, a
forward hook on the MLP) it is computed. Megatron's own full recomputation does not say what
follows in the function it repeats, another layer for one, so there the MLP runs a third time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch

from megatron_seqpar.errors import SeqParError
from megatron_seqpar.integration import recompute, refusals, state
from megatron_seqpar.integration.refusals_mlp import RECOMPUTED, refuse_pieces
from megatron_seqpar.memory.chunked import chunked


def pieces(mlp: Any) -> int:
    """In how many pieces an MLP runs; 0 for as stock code runs it.

    Settings that recompute MLPs recompute a mixture of experts whole, its shared experts with it.
    """
    from megatron.core.transformer.moe.shared_experts import SharedExpertMLP

    asked = state.mlp_chunks()
    if state.config().recompute in RECOMPUTED and not isinstance(mlp, SharedExpertMLP):
        return max(1, asked)
    return asked


def wrap_mlp_init(original: Callable[..., Any]) -> Callable[..., Any]:
    """Patch for `MLP.__init__`: refuse what a piecewise MLP cannot do when the model is built."""

    @functools.wraps(original)
    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        refuse_pieces(config, state.config(), refusals.CONFIG)
        original(self, config, *args, **kwargs)

    return __init__


def wrap_mlp_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """Patch for `MLP.forward`: `[s, b, h]` -> (`[s, b, h]`, output bias or None)."""

    @functools.wraps(original)
    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        count = pieces(self)
        if count == 0 or _sees_chosen_tokens(self, args, kwargs) or _generates(self):
            return original(self, hidden_states, *args, **kwargs)
        # Returned as the parameter it is and added later, with a gradient of its own.
        bias = self.linear_fc2.bias if self.config.add_bias_linear else None

        def run(piece: torch.Tensor) -> torch.Tensor:
            out, returned = original(self, piece)
            if returned is not bias:
                raise SeqParError(
                    f"{type(self).__name__} returned an output bias that is not its parameter, "
                    "and so would get no gradient in pieces. Use --seqpar-mlp-chunks off."
                )
            tokens: torch.Tensor = out
            return tokens

        parameters = [parameter for parameter in self.parameters() if parameter is not bias]
        unread = _unread.get() is self and torch.is_grad_enabled()
        out = chunked(run, hidden_states, parameters, count, elsewhere=in_main_grad, unread=unread)
        return out, bias

    return forward


def in_main_grad(parameter: torch.Tensor) -> bool:
    """Whether the parameter's gradient has gone to its main_grad, by Megatron's own mark.

    Gradient-accumulation fusion adds a weight's gradient to main_grad inside the weight's
    backward, sets the mark, and returns uninitialised memory for autograd to pass on. Parameters
    without fusion are never marked.
    """
    return bool(getattr(parameter, "grad_added_to_main_grad", False))


def _sees_chosen_tokens(mlp: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether this is a routed expert, or gets something besides tokens that would need cutting.

    Dense layers pass `padding_mask`, which only a mixture of experts looks at.
    """
    if getattr(mlp.linear_fc1, "is_expert", False):
        return True
    more = {name: value for name, value in kwargs.items() if name != "padding_mask"}
    return any(value is not None for value in (*args, *more.values()))


def _generates(mlp: Any) -> bool:
    """Whether inference's own kernels run, which fuse the whole sequence's residual in."""
    config = mlp.config
    return not mlp.training and (
        getattr(config, "inference_fuse_tp_communication", False)
        or getattr(config, "transformer_impl", None) == "inference_optimized"
    )


_unread: ContextVar[Any] = ContextVar("seqpar_unread_mlp", default=None)
"""The MLP whose output's values nobody will read."""


def wrap_forward_mlp(original: Callable[..., Any]) -> Callable[..., Any]:
    """Patch for `TransformerLayer._forward_mlp`: say that a repeated layer's output is unread."""

    @functools.wraps(original)
    def _forward_mlp(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not (recompute.replaying() and _only_added(self)):
            return original(self, *args, **kwargs)
        token = _unread.set(self.mlp)
        try:
            return original(self, *args, **kwargs)
        finally:
            _unread.reset(token)

    return _forward_mlp


def _only_added(layer: Any) -> bool:
    """Whether all that happens to the MLP's output is stock bias, dropout and residual sum."""
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.transformer.mlp import MLP
    from megatron.core.transformer.transformer_layer import TransformerLayer

    mlp = layer.mlp
    stock = all(
        getattr(type(layer), name) is getattr(TransformerLayer, name) and name not in vars(layer)
        for name in ("_forward_mlp", "_forward_post_mlp")
    )
    if not isinstance(mlp, MLP):
        return False  # a mixture of experts, or nothing
    hooked = mlp._forward_hooks or torch.nn.modules.module._global_forward_hooks
    return bool(
        stock
        and layer.mlp_bda is get_bias_dropout_add
        and type(mlp).forward is MLP.forward
        and not hooked
        and not torch.is_autocast_enabled("cuda")
        and not torch.is_autocast_enabled("cpu")
    )
