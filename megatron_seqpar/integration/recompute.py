# SPDX-License-Identifier: Apache-2.0
"""Recompute a layer in backward without running its attention again.

Megatron's full recomputation stores a layer's input and repeats the whole layer in backward. For
long sequences attention is most of that, and with the axis its transfers would run again too. With
`--seqpar-recompute attention-output` a layer is checkpointed whole, but attention's output and
log-sum-exp are kept: the repeated layer gets them back, recomputes only queries, keys and values
for attention's own backward, and sends nothing.

Stored per layer and token: the input, attention's output, and one fp32 number per query head. A
layer of a hybrid model that has no attention (MLP, mixture of experts, Mamba) stores its input;
what such a layer sends, between experts or for Mamba over the axis, is sent again.

The store belongs to one call of one layer: a layer runs for several micro-batches before the
first backward under pipeline parallelism, and each call's closure finds what its own forward
kept. Core attention finds the store through a context variable, set only while the layer runs.

The settings that repeat less are in `recompute_parts.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from typing import Any

import torch

from megatron_seqpar.errors import UnsupportedError
from megatron_seqpar.integration import offload, recompute_parts, state
from megatron_seqpar.memory.offload import Parcel

ATTENTION_OUTPUT = "attention-output"


class Keepsake:
    """What one call of one layer keeps of its attention: (out, lse) in the order of the calls.

    out: `[s_local, b, heads, head_dim]`; lse: `[b, heads, s_local]`, fp32. A repetition takes them
    out: what is kept of a layer is gone as soon as its backward is.

    parcel: where they wait for backward; None: where they are.
    """

    def __init__(self, parcel: Parcel | None = None) -> None:
        self._parcel = parcel
        self._kept: list[tuple[Any, Any] | None] = []
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
        """Attention's output: computed and kept in the first run, replayed in the second.

        compute: attention on the inputs at hand; takes `known` and returns (out, lse).
        Raises `UnsupportedError` in a third run.
        """
        if not self._recorded:
            out, lse = compute(known=None)
            self._kept.append((self._put(out), self._put(lse)))
            return out
        kept = self._kept[self._position]
        if kept is None:
            raise UnsupportedError(
                f"--seqpar-recompute {ATTENTION_OUTPUT}: backward runs through a layer a second "
                "time, and attention's output is kept for one. Use --recompute-granularity full."
            )
        self._kept[self._position] = None
        self._position += 1
        out, _ = compute(known=(self._get(kept[0]), self._get(kept[1])))
        return out

    def _put(self, tensor: torch.Tensor) -> Any:
        # Detached: autograd makes what a run returns part of the graph of that run.
        return tensor.detach() if self._parcel is None else self._parcel.put(tensor)

    def _get(self, kept: Any) -> torch.Tensor:
        return kept if self._parcel is None else self._parcel.get(kept)


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
    parcel: Parcel | None = None,
) -> Any:
    """Run `layer(hidden_states)` so that backward repeats all of it but attention.

    checkpoint: Megatron's, called as checkpoint(function, False, hidden_states); it runs the
        function without gradient now and with gradient in backward, with the same random state.
    parcel: where what is kept waits for backward, the input included; None: where it is.
    """
    keepsake = Keepsake(parcel)

    def run(hidden: torch.Tensor) -> Any:
        token = _current.set(keepsake)
        keepsake.begin()
        try:
            return layer(hidden)
        finally:
            keepsake.end()
            _current.reset(token)

    if parcel is None:
        return checkpoint(run, False, hidden_states)

    def pack(tensor: torch.Tensor) -> Any:
        # Megatron adds residuals with gradient on even here; that graph dies with this call.
        return parcel.put(tensor) if keepsake.recorded else tensor

    def unpack(kept: Any) -> torch.Tensor:
        return kept if isinstance(kept, torch.Tensor) else parcel.get(kept)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        result = checkpoint(run, False, hidden_states)
    parcel.close()
    return result


def wrap_layer_forward(original: Callable[..., Any]) -> Any:
    """Patch for `TransformerLayer.forward`, under GPT, MTP and hybrid stacks alike, and Mamba's."""

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        mode = state.config().recompute
        if not self.training or not torch.is_grad_enabled() or current() is not None:
            return original(self, *args, **kwargs)
        if mode == recompute_parts.ATTENTION_QKV:
            with recompute_parts.norms_repeated():
                return original(self, *args, **kwargs)
        if mode != ATTENTION_OUTPUT:
            return original(self, *args, **kwargs)
        if args:
            hidden, args = args[0], args[1:]
        else:
            kwargs = dict(kwargs)
            hidden = kwargs.pop("hidden_states")
        if not hidden.requires_grad:
            return original(self, hidden, *args, **kwargs)
        _refuse_gradients([*enumerate(args, start=1), *kwargs.items()])
        from megatron.core import tensor_parallel

        def layer(hidden_states: torch.Tensor) -> Any:
            return original(self, hidden_states, *args, **kwargs)

        return checkpointed(layer, hidden, tensor_parallel.checkpoint, offload.parcel_for(hidden))

    return forward


def _refuse_gradients(arguments: Iterable[tuple[Any, Any]]) -> None:
    """Tensors that the closure holds besides the input would silently get no gradient."""
    for name, value in arguments:
        for each in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(each, torch.Tensor) and each.requires_grad:
                shown = name if isinstance(name, str) else f"argument {name}"
                raise UnsupportedError(
                    f"--seqpar-recompute {ATTENTION_OUTPUT}: a layer gets {shown}, which needs a "
                    "gradient; only the hidden states may. Use --recompute-granularity full."
                )
