# SPDX-License-Identifier: Apache-2.0
"""Pictures of `plan`: MFU over ranks and lengths, and what fills a rank's memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_seqpar.errors import UnsupportedError
from megatron_seqpar.planner import Cluster, Estimate, Model
from megatron_seqpar.planner.search import Found, search

_GIB = 2**30


def draw_plan(model: Model, cluster: Cluster, found: Found, path: Path) -> None:
    """Draw the best layout over half to eight times the ranks and a quarter to four times the
    length, with the tokens of a step kept, and the memory of the best few."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = found.fitting or found.nearest
    layout = shown[0].layout
    figure, (ranks, lengths, memory) = pyplot.subplots(
        1, 3, figsize=(15, 4.6), layout="constrained"
    )
    counts = [max(1, layout.ranks // 2) * 2**step for step in range(5)]
    points = [_best(model, cluster, n, layout.sequence_length, layout.global_batch) for n in counts]
    _curve(ranks, counts, points, "ranks")
    tokens = layout.sequence_length * layout.global_batch
    sizes = [layout.sequence_length * 2**step // 4 for step in range(5)]
    sizes = [length for length in sizes if 0 < length <= tokens]
    points = [_best(model, cluster, layout.ranks, n, tokens // n) for n in sizes]
    _curve(lengths, sizes, points, "tokens of a sequence")
    _stack(memory, shown[:5], cluster)
    figure.suptitle(f"{cluster.name}, predicted")
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


def _best(
    model: Model, cluster: Cluster, ranks: int, length: int, sequences: int
) -> Estimate | None:
    """The fastest layout that fits; None where there is none."""
    try:
        found = search(
            model,
            cluster,
            ranks=ranks,
            sequence_length=length,
            global_batch=sequences,
            keep=1,
        )
    except UnsupportedError:
        return None
    return found.fitting[0] if found.fitting else None


def _curve(axes: Any, places: Sequence[int], points: Sequence[Estimate | None], label: str) -> None:
    known = [(x, 100 * each.mfu) for x, each in zip(places, points, strict=True) if each]
    axes.plot([x for x, _ in known], [y for _, y in known], marker="o", color="tab:blue")
    for x, each in zip(places, points, strict=True):
        if each is None:
            axes.axvline(x, color="tab:red", linestyle=":", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xlabel(f"{label} (dotted: nothing fits)")
    axes.set_ylabel("MFU %, best layout")
    axes.set_ylim(0, 1.08 * max((y for _, y in known), default=100))
    axes.grid(alpha=0.3)


def _stack(axes: Any, estimates: Sequence[Estimate], cluster: Cluster) -> None:
    bottoms = [0.0] * len(estimates)
    fullest = [max(each.memory.values(), key=lambda one: one.total) for each in estimates]
    for name in fullest[0].parts():
        heights = [memory.parts()[name] / _GIB for memory in fullest]
        axes.bar(range(len(estimates)), heights, bottom=bottoms, label=name)
        bottoms = [low + high for low, high in zip(bottoms, heights, strict=True)]
    axes.axhline(cluster.capacity.value / _GIB, color="black", linestyle="--", linewidth=1)
    labels = [
        f"tp{e.layout.tp} sp{e.layout.sp}\npp{e.layout.pp} dp{e.layout.dp}" for e in estimates
    ]
    axes.set_xticks(range(len(estimates)), labels, fontsize=8)
    axes.set_ylabel("GiB of the fullest rank")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
