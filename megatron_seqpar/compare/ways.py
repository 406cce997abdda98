# SPDX-License-Identifier: Apache-2.0
"""The ways to lay one training out over ranks that a comparison runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_seqpar.compare.config import CompareConfig, WaySection
from megatron_seqpar.experiments.layout import STOCK, Layout
from megatron_seqpar.mfu import Model

UNFUSED = (
    "ways with stock attention run Megatron as shipped. Without Transformer Engine that attention "
    "is unfused: it holds a score matrix of s x s a head, so it loses time and memory to any flash "
    "kernel, whatever the layout. The ways on the same kernel compare the layouts"
)


@dataclass(frozen=True)
class Way:
    """One row of the comparison.

    Attributes:
        label: its name.
        layout: where it runs.
        attention: the kernel, in words.
        changes: model flags changed so that it can run at all.
        extra: flags of this way alone.
        note: what must be known of it.
        unavailable: why it cannot run here.
    """

    label: str
    layout: Layout
    attention: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    unavailable: str = ""


def ways(config: CompareConfig, model: Model, kernel: str, *, has_te: bool) -> list[Way]:
    """All ways of a comparison, the reference (one rank, our kernel) first.

    kernel: the attention kernel of the ways that are not stock. has_te: Transformer Engine is here.
    """
    if config.ways is not None:
        return [_asked(way, config, model, kernel, has_te) for way in config.ways]
    base = Layout(
        config.ranks,
        micro_batch=config.micro_batch_size,
        recompute=config.recompute,
        kernel=kernel,
    )
    size = config.ranks
    layouts = [replace(base, ranks=1)]
    if size > 1:
        layouts.append(replace(base, sp=size))
        layouts += [replace(base, tp=tp, sp=size // tp, tp_sp=True) for tp in _divisors(size)[1:-1]]
        layouts += [replace(base, tp=size), replace(base, tp=size, tp_sp=True)]
    found = [_way(layout, model, has_te) for layout in layouts]
    if not _ours_alone(config.recompute):
        stock = [replace(layouts[0], kernel=STOCK)]
        if size > 1:
            stock += [replace(layout, kernel=STOCK) for layout in layouts[-2:]]
            stock.append(replace(base, cp=size, kernel=STOCK))
        found += [_way(layout, model, has_te) for layout in stock]
    return found


def _way(layout: Layout, model: Model, has_te: bool, label: str | None = None) -> Way:
    changes, note = padded_heads(model, layout.tp)
    if layout.kernel != STOCK:
        attention = f"flash ({layout.kernel})"
    else:
        attention = "stock, Transformer Engine" if has_te else "stock, unfused"
    missing = layout.cp > 1 and not has_te
    name = label or _name(layout)
    return Way(
        label=f"{name} ({_changed(changes)})" if changes else name,
        layout=layout,
        attention=attention,
        changes=changes,
        note=note,
        unavailable="stock CP needs Transformer Engine, which is not here" if missing else "",
    )


def _asked(
    asked: WaySection, config: CompareConfig, model: Model, kernel: str, has_te: bool
) -> Way:
    layout = Layout(
        asked.ranks or config.ranks,
        tp=asked.tp,
        sp=asked.sp,
        cp=asked.cp,
        pp=asked.pp,
        tp_sp=asked.tp_sp,
        micro_batch=config.micro_batch_size,
        recompute=asked.recompute or config.recompute,
        mlp_chunks=asked.mlp_chunks,
        loss_chunks=asked.loss_chunks,
        schedule=asked.schedule,
        kernel=kernel if asked.kernel == "auto" else asked.kernel,
    )
    way = _way(layout, model, has_te, asked.label)
    return replace(way, extra=asked.arguments)


def _name(layout: Layout) -> str:
    words = [f"{name}={size}" for name, size in (("TP", layout.tp), ("SP", layout.sp)) if size > 1]
    words += [f"CP={layout.cp}"] if layout.cp > 1 else []
    words += [f"PP={layout.pp}"] if layout.pp > 1 else []
    words += [f"DP={layout.dp}"] if layout.dp > 1 else []
    name = " x ".join(words) or "SP=1"
    if layout.tp_sp:
        name += " + TP-SP"
    return f"{name}, stock" if layout.kernel == STOCK else name


def padded_heads(model: Model, tp: int) -> tuple[dict[str, Any], str]:
    """Model flags that make the heads divide by `tp`, and a note of what that costs; ({}, "").

    That is what a user of tensor parallelism must do. Heads keep their dim; KV heads, and the query
    heads of each, grow to the least number of query heads in all. The model is another one then:
    its loss is not compared, and its FLOPs are counted as those of the asked one.
    """
    heads, kv = model.query_heads, model.kv_heads
    if heads % tp == 0 and (kv % tp == 0 or tp % kv == 0):
        return {}, ""
    more, kv = min(
        (more_kv * group, more_kv)
        for more_kv in range(kv, kv + tp + 1)
        if more_kv % tp == 0 or tp % more_kv == 0
        for group in range(heads // kv, heads // kv + tp + 1)
        if more_kv * group % tp == 0
    )
    changes: dict[str, Any] = {
        "num-attention-heads": more,
        "kv-channels": model.head_dim,
        "group-query-attention": True,  # with as many groups as heads it is plain attention
        "num-query-groups": kv,
    }
    grown = model.attention_parameters * (more - heads) // heads * model.layers
    note = (
        f"TP={tp} cannot share out {heads} query heads and {model.kv_heads} KV heads: padded to "
        f"{more} and {kv} ({grown / model.parameters:+.1%} weights, another model: its loss is not "
        "compared)"
    )
    return changes, note


def _changed(changes: Mapping[str, Any]) -> str:
    return f"padded to {changes['num-attention-heads']} heads"


def _ours_alone(recompute: str) -> bool:
    """Whether stock Megatron has no such recomputation."""
    return recompute not in ("none", "selective", "full")


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
