# SPDX-License-Identifier: Apache-2.0
"""Recompute parts of a layer: `--seqpar-recompute mlp` and `attention-qkv`.

*mlp* repeats the MLP and nothing else: activations between its two matrices are most of what a
layer keeps, and its forward is the cheapest to repeat for them. Dense MLPs are repeated by
`mlp.py`; mixture-of-experts layers by Megatron's own recomputation of them, switched on here.

*attention-qkv* repeats the layer norms as well. What is then kept is what the attention kernel's
backward reads, queries, keys, values, output and log-sum-exp, and the two residuals.

Megatron's own recomputation of layer norms needs Transformer Engine whatever the precision, and
empties the norm's output under whoever else holds it. Here only what autograd saves is replaced: a
tensor saved while the layer runs that lies in a norm's output is forgotten, with a note how to make
it again, and the first operation to ask for it in backward runs the norm again. With Transformer
Engine's fused norm and linear layers there is no norm to repeat; those keep its output.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from megatron_seqpar.config import as_typed
from megatron_seqpar.errors import UnsupportedError
from megatron_seqpar.integration import refusals, state
from megatron_seqpar.integration.refusals_by_setting import refuse_by_setting

MLP = "mlp"
ATTENTION_QKV = "attention-qkv"

_NORMS = ("input_layernorm", "pre_mlp_layernorm")


class _Again:
    """A norm's output and how to make it again, once for all that ask while it is in use.

    norm: the module; given: its input, which the norm itself saves.
    """

    def __init__(
        self, norm: Callable[[torch.Tensor], torch.Tensor], given: torch.Tensor, out: torch.Tensor
    ) -> None:
        self._norm, self._given, self._version = norm, given.detach(), given._version
        self._storage, self._written = out.untyped_storage().data_ptr(), out._version
        self._made: Callable[[], torch.Tensor | None] = lambda: None

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` lies in the output, which nobody wrote to since."""
        return (
            tensor.untyped_storage().data_ptr() == self._storage
            and tensor._version == self._written
        )

    def made(self) -> torch.Tensor:
        """The output. Raises `RuntimeError` when the input was written to."""
        known = self._made()
        if known is not None:
            return known
        if self._given._version != self._version:
            raise RuntimeError("the input of a layer norm that is to run again was written to")
        with torch.no_grad():
            out = self._norm(self._given)
        self._made = weakref.ref(out)
        return out


class _Part:
    """A tensor in a norm's output: the output's note and where in it the tensor lies."""

    def __init__(self, whole: _Again, tensor: torch.Tensor) -> None:
        self._whole = whole
        self._place = tuple(tensor.shape), tensor.stride(), tensor.storage_offset()

    def made(self) -> torch.Tensor:
        whole = self._whole.made()
        part = whole.as_strided(*self._place)
        part._seqpar_whole = whole  # type: ignore[attr-defined]  # alive while a part is
        return part


class _LayerRun:
    """The outputs of a layer's norms while it runs once."""

    def __init__(self) -> None:
        self._known: list[tuple[_Again, torch.Tensor]] = []  # the output too: its address is taken

    def note(self, norm: Any, given: torch.Tensor, out: torch.Tensor) -> None:
        storage = out.untyped_storage()
        if storage.nbytes() and storage.data_ptr() != given.untyped_storage().data_ptr():
            self._known.append((_Again(norm, given, out), out))

    def pack(self, tensor: torch.Tensor) -> torch.Tensor | _Part:
        for again, _ in self._known:
            if tensor.layout == torch.strided and again.holds(tensor):
                return _Part(again, tensor)
        return tensor

    def end(self) -> None:
        """The layer has run. What autograd saved holds on to this, and must not to the outputs."""
        self._known.clear()


def _unpack(kept: torch.Tensor | _Part) -> torch.Tensor:
    return kept.made() if isinstance(kept, _Part) else kept


_current: ContextVar[_LayerRun | None] = ContextVar("seqpar_norms", default=None)


@contextmanager
def norms_repeated() -> Iterator[None]:
    """While a layer runs: outputs of its norms (those of `prepare`) are not saved for backward."""
    run = _LayerRun()
    token = _current.set(run)
    try:
        with torch.autograd.graph.saved_tensors_hooks(run.pack, _unpack):
            yield
    finally:
        _current.reset(token)
        run.end()


def _note(norm: torch.nn.Module, given: tuple[Any, ...], out: Any) -> None:
    """Forward hook of a norm."""
    run = _current.get()
    if run is not None and torch.is_grad_enabled() and isinstance(out, torch.Tensor):
        run.note(norm, given[0], out)


def alone(value: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """`value`, copied where it alone would keep more memory than its own.

    Megatron makes queries, keys and values with one product and cuts them out of it. Rotary
    embedding then makes new queries and keys, and the values, kept for attention's backward, would
    keep the old ones with them.
    """
    storage = value.untyped_storage()
    shared = storage.data_ptr() in {t.untyped_storage().data_ptr() for t in (query, key)}
    larger = storage.nbytes() > value.numel() * value.element_size()
    return value.contiguous() if larger and not shared else value


def prepare(model: Any) -> None:
    """Make a built model repeat what the settings ask for.

    Raises `UnsupportedError` for a model that recomputes something itself, and naming the modules
    that cannot be repeated.
    """
    mode = state.config().recompute
    if mode not in (MLP, ATTENTION_QKV):
        return
    from megatron.core.transformer.transformer_layer import TransformerLayer

    refuse_by_setting(model.config, state.config(), refusals.CONFIG)
    unknown = []
    for name, module in model.named_modules():
        if not isinstance(module, TransformerLayer):
            continue
        if not _repeats_mlp(module.mlp):
            unknown.append(f"{name}.mlp ({type(module.mlp).__name__})")
        if mode == ATTENTION_QKV:
            _watch_norms(module)
    if unknown:
        raise UnsupportedError(
            f"{as_typed(state.config(), 'recompute')}: {len(unknown)} modules are not Megatron's "
            f"MLP or MoELayer and would not be repeated: {', '.join(unknown[:4])}"
            f"{', ...' if len(unknown) > 4 else ''}. Use --seqpar-recompute attention-output."
        )


def _repeats_mlp(mlp: torch.nn.Module) -> bool:
    """Whether an MLP is repeated; a mixture-of-experts layer is told to be."""
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.mlp import MLP as DenseMLP
    from megatron.core.transformer.moe.moe_layer import MoELayer

    if isinstance(mlp, MoELayer) and hasattr(mlp, "moe_layer_recompute"):
        mlp.moe_layer_recompute = True
        return True
    if isinstance(mlp, IdentityOp):
        return True
    # `mlp.py` replaces this one function
    return getattr(type(mlp), "forward", None) is DenseMLP.forward


def wrap_topk_routing(original: Callable[..., Any]) -> Callable[..., Any]:
    """Patch for `moe_utils.topk_routing_with_score_function`, which sorts with gradient on only.

    So it does since 0.18; before, it always sorts.

    A repeated layer first runs without gradient and then with it: sums over a token's experts would
    be taken in two orders, and the loss and its gradients be those of two runs that differ by
    rounding. What is sorted here has no gradient, so nothing else changes.
    """

    @functools.wraps(original)
    def topk_routing_with_score_function(*args: Any, **kwargs: Any) -> Any:
        if state.config().recompute == "none":
            return original(*args, **kwargs)
        with torch.enable_grad():
            return original(*args, **kwargs)

    return topk_routing_with_score_function


def _watch_norms(layer: Any) -> None:
    from megatron.core.transformer.identity_op import IdentityOp

    for name in _NORMS:
        norm = getattr(layer, name)
        if not isinstance(norm, IdentityOp):
            norm.register_forward_hook(_note)
