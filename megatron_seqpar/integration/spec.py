# SPDX-License-Identifier: Apache-2.0
"""Put our core attention into any layer spec, and prove that no other is left.

A spec is a tree of `ModuleSpec`s, dataclasses of submodules, partials and lists, and Megatron has
many shapes of it: one layer, a block of different layers, MoE, heterogeneous, MTP, hybrid
stacks. `with_seqpar_attention` rewrites the tree by the one thing they share, a submodule called
`core_attention`, and leaves its input as it was. `audit` then walks the built model and refuses
it when something else does attention: a model that attends only within each rank's chunk trains
without an error and learns something else.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from megatron_seqpar.config import as_typed
from megatron_seqpar.errors import UnsupportedError
from megatron_seqpar.integration import recompute_parts, state

FIELD = "core_attention"

STOCK_CLASSES = frozenset({"DotProductAttention", "TEDotProductAttention"})
"""Names of the stock core attentions that ours replaces."""

UNSPLIT_CLASSES = frozenset({"GatedDeltaNet", "DSAttention"})
"""Sequence-mixing modules that are not core attention and are not split over the axis."""


def with_seqpar_attention(spec: Any) -> Any:
    """A copy of `spec` whose stock core attentions are `SeqParCoreAttention`.

    Anything that is not a stock core attention is kept, for `audit` to judge if it is built.
    """
    if isinstance(spec, (list, tuple)):
        parts = [with_seqpar_attention(part) for part in spec]
        return type(spec)(*parts) if hasattr(spec, "_fields") else type(spec)(parts)
    if isinstance(spec, dict):
        return {key: _swap(key, value) for key, value in spec.items()}
    if isinstance(spec, functools.partial):
        keywords = {key: _swap(key, value) for key, value in spec.keywords.items()}
        positional = [with_seqpar_attention(value) for value in spec.args]
        return functools.partial(spec.func, *positional, **keywords)
    if dataclasses.is_dataclass(spec) and not isinstance(spec, type):
        # A shallow copy with changed fields; dataclasses.replace would re-run __post_init__.
        out = copy.copy(spec)
        for field in dataclasses.fields(spec):
            value = getattr(spec, field.name)
            object.__setattr__(out, field.name, _swap(field.name, value))
        return out
    return spec


def _swap(name: str, value: Any) -> Any:
    """One named child of a spec."""
    if name != FIELD:
        return with_seqpar_attention(value)
    from megatron_seqpar.integration.core_attention import SeqParCoreAttention

    built = getattr(value, "module", value)
    if isinstance(value, functools.partial):
        built = value.func
    if isinstance(built, type) and built.__name__ in STOCK_CLASSES:
        return SeqParCoreAttention
    return value


def audit(model: torch.nn.Module) -> int:
    """Check that all attention of a built model goes over the axis.

    Returns the number of our core attentions (a pipeline stage may hold none). Raises
    `UnsupportedError` naming the modules that would attend within one rank's chunk only.
    """
    from megatron_seqpar.integration.core_attention import SeqParCoreAttention

    found: list[str] = []
    ours = 0
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, SeqParCoreAttention):
            ours += 1
        elif name.rsplit(".", 1)[-1] == FIELD or kind in STOCK_CLASSES | UNSPLIT_CLASSES:
            found.append(f"{name or type(model).__name__} ({kind})")
    if found:
        raise UnsupportedError(
            f"{state.context(state.config())}: {len(found)} modules would not see the whole "
            f"sequence: {', '.join(found[:4])}{', ...' if len(found) > 4 else ''}. Use a layer "
            "spec whose core_attention is DotProductAttention or TEDotProductAttention."
        )
    return ours


def wrap_model_init(original: Callable[..., None], spec_names: tuple[str, ...]) -> Any:
    """Patch for a language model's `__init__`: rewrite its specs, build it, audit it.

    What the model is to repeat in backward is set up as well.

    spec_names: the constructor's arguments that hold specs.
    """
    signature = inspect.signature(original)

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if not state.config().replaces_core_attention:
            original(self, *args, **kwargs)
            recompute_parts.prepare(self)
            return
        bound = signature.bind(self, *args, **kwargs)
        for name in spec_names:
            if bound.arguments.get(name) is not None:
                bound.arguments[name] = with_seqpar_attention(bound.arguments[name])
        original(*bound.args, **bound.kwargs)
        audit(self)
        recompute_parts.prepare(self)

    return __init__


def wrap_gpt_model_init(original: Callable[..., None]) -> Any:
    """Patch for `GPTModel.__init__`."""
    return wrap_model_init(original, ("transformer_layer_spec", "mtp_block_spec"))


def wrap_hybrid_model_init(original: Callable[..., None]) -> Any:
    """Patch for `HybridModel.__init__`; `MambaModel` derives from it since 0.18."""
    return wrap_model_init(original, ("hybrid_stack_spec",))


def wrap_mamba_model_init(original: Callable[..., None]) -> Any:
    """Patch for `MambaModel.__init__` before 0.18."""
    return wrap_model_init(original, ("mamba_stack_spec",))


def wrap_stock_attention_init(original: Callable[..., None]) -> Any:
    """Patch for the constructor of a stock core attention: refuse it where ours is needed.

    The last line of defence, for models that no other patch rewrites (BERT, T5, vision): with the
    axis and Transformer Engine they would otherwise attend in an order their tokens are not in,
    and with our recomputation their attention would be repeated after all.
    """

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        config = state.config()
        if config.active:
            raise UnsupportedError(
                f"{state.context(config)}: a model builds {type(self).__name__}, "
                "which does not attend over the axis. Models built on GPTModel or HybridModel "
                "are served; use tensor parallelism for others."
            )
        if config.keeps_attention:
            raise UnsupportedError(
                f"{as_typed(config, 'recompute')}: a model builds {type(self).__name__}, which "
                "keeps something else for backward. Models built on GPTModel or HybridModel are "
                "served; use --recompute-granularity for others."
            )
        original(self, *args, **kwargs)

    return __init__


def seqpar_layer_spec(config: Any, *args: Any, **kwargs: Any) -> Any:
    """Megatron's default GPT layer spec with our core attention.

    For `--spec megatron_seqpar.integration.spec seqpar_layer_spec` and for code that builds
    models itself. config: `TransformerConfig`; other arguments are ignored.
    """
    from megatron.core.models.gpt import gpt_layer_specs

    spec = gpt_layer_specs.get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=config.transformer_impl == "transformer_engine",
        normalization=config.normalization,
    )
    return with_seqpar_attention(spec)
