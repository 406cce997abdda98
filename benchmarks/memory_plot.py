# SPDX-License-Identifier: Apache-2.0
"""Pictures of the memory benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

GIB, MIB = 2**30, 2**20
STYLE = {
    "stock": ("tab:red", "--"),
    "stock, full recompute": ("tab:orange", "--"),
    "none": ("tab:gray", "-"),
    "full recompute": ("tab:brown", "-"),
    "attention-output": ("tab:blue", "-"),
    "full recompute + mini-sequence": ("tab:olive", "-"),
    "attention-output + mini-sequence": ("tab:green", "-"),
    "attention-output + mini-sequence + offload": ("tab:purple", "-"),
}


def _figure() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def memory(result: dict[str, Any], path: Path) -> None:
    """Peak memory and time over full recomputation's, against the length; a column a size."""
    pyplot = _figure()
    sizes = list(result["by_ranks"])
    figure, grid = pyplot.subplots(
        2, len(sizes), figsize=(5.6 * len(sizes), 8), layout="constrained", squeeze=False
    )
    for column, size in enumerate(sizes):
        by_length = result["by_ranks"][size]
        lengths = [int(length) for length in by_length]
        for name, (color, dashes) in STYLE.items():
            rows = {
                int(length): cell["ways"][name]
                for length, cell in by_length.items()
                if cell["ways"].get(name, {}).get("status") == "ok"
            }
            style = {"color": color, "linestyle": dashes, "marker": "o", "label": name}
            if not rows:
                continue
            taken = [row["memory_since_start_bytes"] / MIB for row in rows.values()]
            grid[0][column].plot(list(rows), taken, **style)
            ratios = {n: row.get("time_over_full_recompute") for n, row in rows.items()}
            shown = {n: ratio for n, ratio in ratios.items() if ratio is not None}
            grid[1][column].plot(list(shown), list(shown.values()), **style)
        grid[0][column].set_title(f"{size} rank{'s' * (size != '1')}")
        grid[0][column].set_yscale("log")
        grid[0][column].set_ylabel("peak memory a rank since the start, MiB")
        grid[1][column].set_ylabel("step time over full recompute's")
        grid[1][column].set_ylim(0.5, 2.0)
        for row in range(2):
            axes = grid[row][column]
            axes.set_xscale("log", base=2)
            axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
            axes.set_xlabel("tokens a sequence")
            axes.grid(alpha=0.3)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    figure.suptitle(f"Memory and time of a training step ({result['device']})")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def longest(result: dict[str, Any], path: Path) -> None:
    """The longest sequence of each way as bars, with its ratio to the first way's."""
    pyplot = _figure()
    ways = {name: row for name, row in result["ways"].items() if row.get("longest")}
    figure, axes = pyplot.subplots(figsize=(8.5, 0.55 * len(ways) + 1.6), layout="constrained")
    names = list(ways)[::-1]
    values = [ways[name]["longest"] for name in names]
    bars = axes.barh(names, values, color=[STYLE[name][0] for name in names])
    base = ways.get("stock", ways[next(iter(ways))])["longest"]
    labels = [
        f"{'at least ' if ways[name]['at_least'] else ''}{value:,} ({value / base:.1f} x)"
        for name, value in zip(names, values, strict=True)
    ]
    axes.bar_label(bars, labels=labels, padding=4, fontsize=9)
    axes.set_xlim(0, max(values) * 1.3)
    axes.set_xlabel(f"tokens that train in one rank with {result['limit']}")
    axes.set_title(f"Longest sequence ({result['device']}, {result['name']})")
    axes.grid(alpha=0.3, axis="x")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
