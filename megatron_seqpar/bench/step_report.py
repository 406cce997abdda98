# SPDX-License-Identifier: Apache-2.0
"""Table and picture of the training-step benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from . import drawing

MIB = 2**20


def table(result: dict[str, Any]) -> Table:
    """One line a length and way."""
    on_gpu = result["device"] == "cuda"
    memory = "peak, MiB" if on_gpu else "peak since start, MiB"
    bases = list(dict.fromkeys(base for row in result["rows"] for base in row.get("time_over", ())))
    shown = Table(
        title=(
            f"Training step, {_named(result)}, {result['device_name']}, medians of "
            f"{result['settings']['rounds']} rounds"
        )
    )
    for name in ("tokens", "way", "s/step", "tokens/s", *(f"time / {base}" for base in bases)):
        shown.add_column(name, justify="left" if name == "way" else "right", no_wrap=name == "way")
    unit, scale = ("TFLOP/s", 1.0) if on_gpu else ("GFLOP/s", 1e3)
    for name in (memory, "sent a rank, MiB", f"{unit} a rank", "MFU", "loss difference"):
        shown.add_column(name, justify="right")
    last = None
    for row in result["rows"]:
        if last not in (None, row["tokens"]):
            shown.add_section()
        last = row["tokens"]
        start = (f"{row['tokens']:,}", row["way"])
        if row["status"] != "ok":
            shown.add_row(*start, row["status"])
            continue
        peak = row["peak_memory_bytes" if on_gpu else "memory_since_start_bytes"]
        mfu, difference = row["mfu"], row["largest_loss_difference"]
        shown.add_row(
            *start,
            f"{row['seconds']:.3g}",
            f"{row['tokens_per_second']:,.0f}",
            *("" if row["time_over"][b] is None else f"{row['time_over'][b]:.3f}" for b in bases),
            f"{peak / MIB:,.0f}",
            f"{row['bytes_sent_per_step'] / MIB:,.1f}",
            f"{scale * row['model_tflops_per_rank']:.3g}",
            "" if mfu is None else f"{mfu:.1%}",
            "" if difference is None else f"{difference:.0e}",
        )
    return shown


def _named(result: dict[str, Any]) -> str:
    layers = result["settings"]["layers"]
    return f"{result['model']['name']}, {layers} layer{'s' * (layers > 1)}"


def failures(result: dict[str, Any]) -> list[str]:
    """Why rows have no numbers: one line each, the end of what the run said."""
    return [
        f"{row['tokens']:,} tokens, {row['way']}: {row['status']}: {_last(row['why'])}"
        for row in result["rows"]
        if row["status"] != "ok"
    ]


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def plot(result: dict[str, Any], path: Path) -> None:
    """Tokens a second and peak memory against the length; a cross where memory did not suffice."""
    rows = result["rows"]
    ways = list(dict.fromkeys(row["way"] for row in rows))
    lengths = sorted({row["tokens"] for row in rows})
    on_gpu = result["device"] == "cuda"
    figure, grid = drawing.figure(1, 2, (6.2, 4.8))
    fields = (
        ("tokens_per_second", 1.0, "tokens/s"),
        ("peak_memory_bytes", 2**30, "peak memory a rank, GiB")
        if on_gpu
        else ("memory_since_start_bytes", MIB, "peak memory a rank since the start, MiB"),
    )
    for axes, (field, unit, label) in zip(grid[0], fields, strict=True):
        for index, way in enumerate(ways):
            mine = [row for row in rows if row["way"] == way and row["status"] == "ok"]
            dashes = "--" if "stock" in way else "-"
            axes.plot(
                [row["tokens"] for row in mine], [row[field] / unit for row in mine],
                marker="o", markersize=4, linestyle=dashes, color=f"C{index % 10}", label=way,
            )  # fmt: skip
        drawing.logarithmic(axes)
        axes.set_ylabel(label)
        drawing.tokens(axes, lengths)
    _crosses(grid[0][0], rows, ways)
    drawing.legend(figure, [grid[0][0]], columns=4)
    figure.suptitle(f"Training step, {_named(result)} ({result['device_name']})", fontsize=11)
    drawing.save(figure, path)


def _crosses(axes: Any, rows: list[dict[str, Any]], ways: list[str]) -> None:
    """A row of crosses along the bottom: lengths at which a way ran out of memory."""
    failed = [row for row in rows if row["status"] in ("oom", "left out")]
    for row in failed:
        index = ways.index(row["way"])
        axes.plot(
            [row["tokens"]], [0.02 + 0.03 * index], marker="x", color=f"C{index % 10}",
            transform=axes.get_xaxis_transform(), linestyle="",
        )  # fmt: skip
    if failed:
        axes.set_title("crosses: out of memory, or left out as too large", fontsize=8)
