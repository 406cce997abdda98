# SPDX-License-Identifier: Apache-2.0
"""Table and picture of the attention benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from . import drawing
from .attention_cells import BUSY, ONE_RANK

_RATIOS = ("efficiency", "efficiency_busy", "over_first")


def table(result: dict[str, Any]) -> Table:
    """One line a way."""
    setting = result["settings"]
    shown = Table(
        title=(
            f"Attention, forward and backward, {setting['mask']}, {setting['heads']}:"
            f"{setting['kv_heads']} heads of {setting['head_dim']}, {setting['dtype']}, medians of "
            f"{setting['rounds']} rounds"
        ),
        caption=(
            "efficiency: time of one rank / (ranks x time); busy: of one rank while all compute; "
            "over first: time over the first schedule's, of the same round"
        ),
    )
    unit, scale = _speed(result)
    for name in ("ranks", "kernel", "tokens", "way", "ms", f"{unit} a rank"):
        shown.add_column(name, justify="left" if name in ("kernel", "way") else "right")
    for name in ("efficiency", "busy", "over first", "idle", "sent a rank, MiB", "difference"):
        shown.add_column(name, justify="right")
    last = None
    for row in result["rows"]:
        key = (row["ranks"], row["kernel"], row["tokens"])
        if last not in (None, key):
            shown.add_section()
        last = key
        took = (
            f" ({row['schedule']})" if row["way"].startswith("auto") and "schedule" in row else ""
        )
        start = (str(row["ranks"]), row["kernel"], f"{row['tokens']:,}", row["way"] + took)
        if row["status"] != "ok":
            shown.add_row(*start, row["status"])
            continue
        shown.add_row(
            *start,
            f"{1e3 * row['seconds']:,.2f}",
            f"{scale * row['tflops_per_rank']:.3g}",
            *(_cell(row.get(name), "{:.3f}") for name in _RATIOS),
            _cell(row.get("idle_fraction"), "{:.0%}"),
            _cell(row.get("bytes_sent_per_rank"), "{:,.1f}", 2**20),
            _cell(row.get("largest_difference_from_one_rank"), "{:.0e}"),
        )
    return shown


def _speed(result: dict[str, Any]) -> tuple[str, float]:
    """Unit of speeds, and how many there are in a TFLOP/s: a CPU core has a few hundredths."""
    return ("TFLOP/s", 1.0) if result["device"] == "cuda" else ("GFLOP/s", 1e3)


def _cell(value: float | None, form: str, unit: float = 1.0) -> str:
    return "" if value is None else form.format(value / unit)


def refusals(result: dict[str, Any]) -> list[str]:
    """Why rows have no numbers, each reason once."""
    lines = [
        f"{_ranks(row['ranks'])}, {row['kernel']}, {row['way']}: {row['status']}: {row['why']}"
        for row in result["rows"]
        if row["status"] != "ok"
    ]
    return list(dict.fromkeys(lines))


def _ranks(count: int) -> str:
    return f"{count} rank{'s' * (count > 1)}"


def plot(result: dict[str, Any], path: Path) -> None:
    """Efficiency and TFLOP/s of a rank against the length: a column a number of ranks."""
    rows = [row for row in result["rows"] if row["status"] == "ok"]
    sizes = sorted({row["ranks"] for row in rows}) or [result["rows"][0]["ranks"]]
    split = any(size > 1 for size in sizes)
    ways = list(dict.fromkeys(row["way"] for row in rows))
    unit, scale = _speed(result)
    figure, grid = drawing.figure(2 if split else 1, len(sizes), (5.6, 3.6))
    for column, size in enumerate(sizes):
        mine = [row for row in rows if row["ranks"] == size]
        lengths = sorted({row["tokens"] for row in mine})
        speed = grid[-1][column]
        _lines(speed, mine, "tflops_per_rank", ways, scale)
        speed.set_ylabel(f"{unit} a rank")
        speed.set_ylim(bottom=0)
        drawing.tokens(speed, lengths)
        speed.set_title(_ranks(size))
        if not split:
            continue
        axes = grid[0][column]
        _lines(axes, mine, "efficiency", ways)
        axes.axhline(1, color="grey", linewidth=1, linestyle="--")
        axes.set_ylabel("one rank's time / (ranks x time)")
        axes.set_ylim(bottom=0)
        axes.set_title(_ranks(size))
        drawing.tokens(axes, lengths)
    drawing.legend(figure, list(grid.flat))
    where = result["gpus"][0]["name"] if result["device"] == "cuda" else result["cpu"]
    figure.suptitle(f"Attention, forward and backward ({where})", fontsize=11)
    drawing.save(figure, path)


def _lines(
    axes: Any, rows: list[dict[str, Any]], field: str, ways: list[str], scale: float = 1.0
) -> None:
    """One line a kernel and way; kernels differ in their dashes, ways in colour."""
    kernels = list(dict.fromkeys(row["kernel"] for row in rows))
    dashes = ("-", "--", ":", "-.")
    for kernel in kernels:
        for way in ways:
            chosen = [
                (row["tokens"], scale * row[field])
                for row in rows
                if (row["kernel"], row["way"]) == (kernel, way) and row.get(field) is not None
            ]
            if chosen:
                axes.plot(
                    *zip(*sorted(chosen), strict=True),
                    label=way if len(kernels) == 1 else f"{way} ({kernel})",
                    color=_colour(way, ways),
                    linestyle=dashes[kernels.index(kernel) % len(dashes)],
                    marker="o",
                    markersize=4,
                )


def _colour(way: str, ways: list[str]) -> str:
    fixed = {ONE_RANK: "black", BUSY: "grey"}
    others = [name for name in ways if name not in fixed]
    return fixed.get(way) or f"C{others.index(way) % 10}"
