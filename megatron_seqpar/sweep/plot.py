# SPDX-License-Identifier: Apache-2.0
"""Effects of single choices, and scaling over ranks and sequence length, as one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_seqpar.experiments.store import save_picture
from megatron_seqpar.sweep.report import Effect, effects, groups, ranked


def plot(rows: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Best layouts, effects, and time and MFU of the best against ranks and sequence length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 3, figsize=(21, 11), layout="constrained")
    (best, tp_pp, effect), (ranks_time, length_time, share) = panels
    _best(best, rows)
    _scatter(tp_pp, rows)
    _effects(effect, effects(rows))
    _scaling(ranks_time, rows, "world_size", "seq_len", "step_time_s", "s/step of the best layout")
    _scaling(length_time, rows, "seq_len", "world_size", "step_time_s", "s/step of the best layout")
    if any(row["mfu"] is not None for row in rows):
        _scaling(
            share, rows, "seq_len", "world_size", "causal_mfu", "causal MFU of the best layout"
        )
    else:
        _scaling(
            share, rows, "seq_len", "world_size", "tokens_per_s", "tokens/s of the best layout"
        )
    figure.suptitle(title)
    save_picture(figure, path)
    pyplot.close(figure)


def _best(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Step time over that of the group's best: every run that is ok, sorted; the first 15 named."""
    members = [
        (row, rank[0]) for rank in map(ranked, groups(rows).values()) if rank for row in rank
    ]
    ratios = sorted(
        ((row["step_time_s"] / first["step_time_s"], row) for row, first in members),
        key=lambda pair: pair[0],
    )[:15]
    axes.barh(range(len(ratios)), [ratio for ratio, _ in ratios], color="C0", alpha=0.8)
    names = [f"{row['layout']}, {row['seq_len']:,} tokens" for _, row in ratios]
    axes.set_yticks(range(len(ratios)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("step time over the best of the same ranks and length")
    axes.grid(axis="x", alpha=0.3)


def _scatter(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Every run: step time over its group's best, against memory; colour is SP, marker PP."""
    markers = {1: "o", 2: "s", 4: "^", 8: "D"}
    seen = set()
    for members in groups(rows).values():
        fastest = ranked(members)
        for row in fastest:
            mark = (row["sp"], row["pp"])
            axes.scatter(
                row["memory_since_start_bytes"] / 2**20,
                row["step_time_s"] / fastest[0]["step_time_s"],
                color=f"C{(row['sp'] - 1).bit_length()}",
                marker=markers.get(row["pp"], "v"),
                alpha=0.7,
                label=None if mark in seen else f"SP={row['sp']} PP={row['pp']}",
            )
            seen.add(mark)
    axes.set_xlabel("peak memory a rank since start, MiB")
    axes.set_ylabel("step time over the best")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    if seen:
        axes.legend(fontsize=8)


def _effects(axes: Any, found: Sequence[Effect]) -> None:
    """Matched pairs of every choice: below 1 the later value is faster."""
    for place, effect in enumerate(found):
        axes.scatter(effect.ratios, [place] * len(effect.ratios), s=14, alpha=0.6, color="C0")
        axes.scatter([effect.median], [place], marker="|", s=250, color="C3")
    names = [f"{e.factor.replace('seq_parallel', 'TP-SP')}: {e.before} to {e.after}" for e in found]
    axes.set_yticks(range(len(found)), names, fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("step time after / before, all else alike (bar: median)")
    axes.grid(axis="x", alpha=0.3)


def _scaling(
    axes: Any, rows: Sequence[Mapping[str, Any]], over: str, by: str, value: str, label: str
) -> None:
    """The best layout of each group: one line for each `by` (and global batch)."""
    lines: dict[tuple[Any, Any], list[tuple[float, float]]] = {}
    for members in groups(rows).values():
        fastest = ranked(members)
        if fastest and fastest[0][value] is not None:
            first = fastest[0]
            line = lines.setdefault((first[by], first["global_batch"]), [])
            line.append((first[over], first[value]))
    for (line, batch), points in sorted(lines.items()):
        xs, ys = zip(*sorted(points), strict=True)
        name = f"{line:,} tokens" if by == "seq_len" else f"{line} ranks"
        axes.plot(xs, ys, marker="o", label=f"{name}, {batch} sequences")
    ticks = sorted({x for points in lines.values() for x, _ in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_xlabel("ranks" if over == "world_size" else "tokens a sequence")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    if lines:
        axes.legend(fontsize=8)
