# SPDX-License-Identifier: Apache-2.0
"""Table and picture of the memory benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from . import drawing

MIB = 2**20
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


def table(result: dict[str, Any]) -> Table:
    """One line a number of ranks, length and way."""
    settings = result["settings"]
    shown = Table(
        title=(
            f"Memory and time, {result['model']['name']}, {settings['chunks']} pieces, "
            f"{result['device_name']}, medians of {settings['rounds']} rounds"
        )
    )
    for name in (
        "ranks", "tokens", "way", "s/step", "time / none", "time / full", "peak since start, MiB",
        "allocator's peak, MiB", "loss difference",
    ):  # fmt: skip
        shown.add_column(name, justify="left" if name == "way" else "right", no_wrap=name == "way")
    last = None
    for row in result["rows"]:
        key = (row["ranks"], row["tokens"])
        if last not in (None, key):
            shown.add_section()
        last = key
        start = (str(row["ranks"]), f"{row['tokens']:,}", row["way"])
        if row["status"] != "ok":
            shown.add_row(*start, row["status"])
            continue
        allocator, over = row["allocator_peak_bytes"], row["time_over"]
        difference = row["largest_loss_difference"]
        shown.add_row(
            *start,
            f"{row['seconds']:.3g}",
            *("" if over[b] is None else f"{over[b]:.3f}" for b in ("none", "full recompute")),
            f"{row['memory_since_start_bytes'] / MIB:,.0f}",
            "" if allocator is None else f"{allocator / MIB:,.0f}",
            "" if difference is None else f"{difference:.0e}",
        )
    return shown


def plot(result: dict[str, Any], path: Path) -> None:
    """Peak memory and time over full recomputation's, against the length; a column a size."""
    sizes = sorted({row["ranks"] for row in result["rows"]})
    figure, grid = drawing.figure(2, len(sizes), (5.6, 4.0))
    for column, size in enumerate(sizes):
        mine = [row for row in result["rows"] if row["ranks"] == size]
        lengths = sorted({row["tokens"] for row in mine})
        above, below = grid[0][column], grid[1][column]
        for name, (color, dashes) in STYLE.items():
            rows = [row for row in mine if row["way"] == name and row["status"] == "ok"]
            if not rows:
                continue
            style = {"color": color, "linestyle": dashes, "marker": "o", "label": name}
            at = [row["tokens"] for row in rows]
            above.plot(at, [row["memory_since_start_bytes"] / MIB for row in rows], **style)
            ratios = [(row["tokens"], row["time_over"]["full recompute"]) for row in rows]
            known = [pair for pair in ratios if pair[1] is not None]
            if known:
                below.plot(*zip(*known, strict=True), **style)
        above.set_title(f"{size} rank{'s' if size > 1 else ''}")
        drawing.logarithmic(above)
        above.set_ylabel("peak memory a rank since the start, MiB")
        below.set_ylabel("step time over full recompute's")
        below.axhline(1, color="grey", linewidth=1, linestyle="--")
        below.set_ylim(bottom=0)
        for axes in (above, below):
            drawing.tokens(axes, lengths)
    drawing.legend(figure, list(grid[0]))
    figure.suptitle(
        f"Memory and time of a training step, {result['model']['name']} ({result['device_name']})",
        fontsize=11,
    )
    drawing.save(figure, path)
