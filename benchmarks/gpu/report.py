# SPDX-License-Identifier: Apache-2.0
"""What all parts found: a table for people, one JSON file, and two pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.gpu import speed

STYLES = {"ok": "green", "failed": "red", "left out": "yellow"}


def summary(parts: dict[str, dict[str, Any]]) -> Table:
    """One row a part."""
    table = Table(title="GPU check")
    for column in ("part", "result", "time, s", "what was found"):
        table.add_column(column, justify="right" if column == "time, s" else "left")
    for name, part in parts.items():
        status = part["status"]
        lines = [part["says"], *part["failures"][:6]]
        if len(part["failures"]) > 6:
            lines.append(f"... and {len(part['failures']) - 6} more")
        table.add_row(
            name,
            f"[{STYLES[status]}]{status}[/]",
            f"{part['seconds']:.0f}",
            "\n".join(filter(None, lines)).replace("[", "\\["),
        )
    return table


def speeds(parts: dict[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rows of the part "speed" by kernel."""
    return {
        name.partition(":")[2]: part["data"]["rows"]
        for name, part in parts.items()
        if name.startswith("speed:") and part["data"].get("rows")
    }


def speed_table(rows: dict[str, list[dict[str, Any]]]) -> Table:
    """TFLOP/s of every kernel, and as a share of the best."""
    table = Table(title="TFLOP/s by tile (share of the fastest kernel's)")
    for column in ("tile", "tokens", "heads", "head dim", "pass", *rows):
        table.add_column(column, justify="left" if column in ("tile", "pass") else "right")
    for row in speed.against_best(rows):
        best = row["tflops"][row["best"]]
        rates = [
            f"{row['tflops'][name]:.4g} ({row['tflops'][name] / best:.2f})"
            if name in row["tflops"]
            else "-"
            for name in rows
        ]
        heads = f"{row['heads']}:{row['kv_heads']}"
        table.add_row(
            row["kind"], f"{row['tokens']:,}", heads, str(row["dim"]), row["pass"], *rates
        )
    return table


def plot_speeds(rows: dict[str, list[dict[str, Any]]], title: str, path: Path) -> None:
    """TFLOP/s over tokens: a panel for each pass and head dim, a line a kernel and kind of tile."""
    pyplot = _pyplot()
    dims = sorted({row["dim"] for kernel in rows.values() for row in kernel})
    figure, panels = pyplot.subplots(
        2, len(dims), figsize=(5.5 * len(dims), 7.5), squeeze=False, layout="constrained"
    )
    for line, direction in enumerate(("forward", "backward")):
        for column, dim in enumerate(dims):
            axes = panels[line][column]
            for color, (kernel, cases) in enumerate(rows.items()):
                _lines(axes, kernel, color, [c for c in cases if c["dim"] == dim], direction)
            axes.set_title(f"{direction}, head dim {dim}")
            axes.set_xscale("log", base=2)
            axes.set_ylim(bottom=0)
            axes.set_xlabel("tokens")
            axes.set_ylabel("TFLOP/s")
            axes.grid(alpha=0.3)
    panels[0][0].legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


def _lines(axes: Any, kernel: str, color: int, cases: list[dict[str, Any]], direction: str) -> None:
    for kind in dict.fromkeys(case["kind"] for case in cases):
        mine = [c for c in cases if c["kind"] == kind and c["heads"] == c["kv_heads"]]
        if not mine:
            continue
        style = {"causal": "-", "full": "--"}.get(kind, ":")
        axes.plot(
            [c["tokens"] for c in mine],
            [c[f"{direction}_tflops"] for c in mine],
            style, marker="o", markersize=3, color=f"C{color}", label=f"{kernel}, {kind}",
        )  # fmt: skip


def plot_tiles(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Tiles and merges over one call, a group of bars a row of the part "tiles"."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(max(6.0, 1.3 * len(rows)), 4.5), layout="constrained")
    keys = {"ratio_forward": "forward", "ratio_backward": "backward", "ratio": "both passes"}
    for index, (key, label) in enumerate(keys.items()):
        at = [number + 0.27 * (index - 1) for number in range(len(rows))]
        axes.bar(at, [row[key] for row in rows], width=0.25, label=label)
    axes.axhline(1, color="grey", linewidth=1)
    axes.axhline(1.05, color="grey", linewidth=1, linestyle="--")
    names = [f"{row['schedule']}\n{row['kernel']}\n{row['tokens'][0]:,}" for row in rows]
    axes.set_xticks(range(len(rows)), names, fontsize=8)
    axes.set_ylabel("tiles and merges of all ranks / one call")
    axes.legend(loc="lower right")
    axes.set_title(title)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
