# SPDX-License-Identifier: Apache-2.0
"""Recompute a layer in backward without running its attention again.

Megatron's full recomputation stores a layer's input and repeats the whole layer in backward. For
long sequences attention is most of that, and with the axis its transfers would run again too. With
`--seqpar-recompute attention-output` a layer is checkpointed whole, but attention's output and
log-sum-exp are kept: the repeated layer gets them back, recomputes only queries, keys and values
for attention's own backward, and sends nothing.

Stored per layer and token: the input, attention's output, and one fp32 number per query head.

The store belongs to one call of one layer: a layer runs for several micro-batches before the
first backward under pipeline parallelism, and each call's closure finds what its own forward
kept. Core attention finds the store through a context variable, set only while the layer runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch

from megatron_seqpar.errors import UnsupportedError
from megatron_seqpar.integration import state

ATTENTION_OUTPUT = "attention-output"


class Keepsake:
    """What one call of one layer keeps of its attention: (out, lse) in the order of the calls.

    out: `[s_local, b, heads, head_dim]`; lse: `[b, heads, s_local]`, fp32.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._recorded = False
        self._position = 0

    @property
    def recorded(self) -> bool:
        """Whether the layer has run; a run is a repetition then."""
        return self._recorded

    def begin(self) -> None:
        """The layer runs: for the first time, or again."""
        self._position = 0

    def end(self) -> None:
        """The layer has run; from now on runs are repetitions."""
        self._recorded = True

    def attend(self, compute: Callable[..., Any]) -> torch.Tensor:
        """Attention's output: computed and kept in the first run, replayed in later ones.

        compute: attention on the inputs at hand; takes `known` and returns (out, lse).
        """
        if not self._recorded:
            out, lse = compute(known=None)
            self._kept.append((out.detach(), lse.detach()))
            return out
        out, lse = self._kept[self._position]
        self._position += 1
        # Fresh aliases: autograd makes the returned tensors part of the graph of this run.
        out, _ = compute(known=(out.detach(), lse.detach()))
        return out


_current: ContextVar[Keepsake | None] = ContextVar("seqpar_keepsake", default=None)


def current() -> Keepsake | None:
    """The store of the layer that is running, None outside of recomputed layers."""
    return _current.get()


def replaying() -> bool:
    """Whether a checkpointed layer is being run again; False in the backward that follows."""
    keepsake = _current.get()
    return keepsake is not None and keepsake.recorded


def checkpointed(
    layer: Callable[[torch.Tensor], Any],
    hidden_states: torch.Tensor,
    checkpoint: Callable[..., Any],
) -> Any:
    """Run `layer(hidden_states)` so that backward repeats all of it but attention.

    checkpoint: Megatron's, called as checkpoint(function, False, hidden_states); it runs the
        function without gradient now and with gradient in backward, with the same random state.
    """
    keepsake = Keepsake()

    def run(hidden: torch.Tensor) -> Any:
        token = _current.set(keepsake)
        keepsake.begin()
        try:
            return layer(hidden)
        finally:
            keepsake.end()
            _current.reset(token)

    return checkpoint(run, False, hidden_states)


def wrap_transformer_layer_forward(original: Callable[..., Any]) -> Any:
    """Patch for `TransformerLayer.forward`, under GPT, MTP and hybrid stacks alike."""

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if state.config().recompute != ATTENTION_OUTPUT or not self.training:
            return original(self, *args, **kwargs)
        if args:
            hidden, args = args[0], args[1:]
        else:
            kwargs = dict(kwargs)
            hidden = kwargs.pop("hidden_states")
        if not torch.is_grad_enabled() or not hidden.requires_grad:
            return original(self, hidden, *args, **kwargs)
        # Tensors the closure holds besides the input would silently get no gradient.
        for name, value in kwargs.items():
            if isinstance(value, torch.Tensor) and value.requires_grad:
                raise UnsupportedError(
                    f"--seqpar-recompute {ATTENTION_OUTPUT}: a layer gets {name}, which needs a "
                    "gradient; only the hidden states may. Use --recompute-granularity full."
                )
        from megatron.core import tensor_parallel

        def layer(hidden_states: torch.Tensor) -> Any:
            return original(self, hidden_states, *args, **kwargs)

        return checkpointed(layer, hidden, tensor_parallel.checkpoint)

    return forward
