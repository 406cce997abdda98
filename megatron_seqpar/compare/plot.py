# SPDX-License-Identifier: Apache-2.0
"""The comparison as a picture: losses on each other, and what each way costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_seqpar.experiments.store import save_picture

_MIB = 2**20
_BARS = (
    ("step_time_s", 1.0, "s/step (whiskers: slowest and fastest)"),
    ("memory_since_start_bytes", _MIB, "peak memory a rank since start, MiB"),
    ("bytes_sent_per_step", _MIB, "sent a rank and step, MiB"),
)


def plot(by_length: Mapping[str, Sequence[Mapping[str, Any]]], title: str, path: Path) -> None:
    """One line of panels a sequence length: losses, their differences, time, memory, bytes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        len(by_length),
        5,
        figsize=(24, 1.2 + 4.2 * len(by_length)),
        squeeze=False,
        layout="constrained",
    )
    for line, (length, rows) in zip(panels, by_length.items(), strict=True):
        colors = {row["label"]: f"C{index % 10}" for index, row in enumerate(rows)}
        _losses(line[0], line[1], rows, colors)
        line[0].set_title(f"{int(length):,} tokens a sequence")
        for axes, (key, unit, label) in zip(line[2:], _BARS, strict=True):
            _bars(axes, rows, key, unit, label, colors)
        for axes in line[3:]:
            axes.set_yticklabels([])
    figure.suptitle(title)
    save_picture(figure, path)
    pyplot.close(figure)


def _losses(
    left: Any, right: Any, rows: Sequence[Mapping[str, Any]], colors: Mapping[str, str]
) -> None:
    """Loss curves, and how far each is from the reference; equal losses are drawn at 1e-9."""
    done = [row for row in rows if row["status"] == "ok" and None not in row["losses"]]
    base = next((row["losses"] for row in done if row["reference"]), None)
    for index, row in enumerate(done):
        steps = range(1, len(row["losses"]) + 1)
        style = {"color": colors[row["label"]], "label": row["label"]}
        wide = max(1.0, 6 - index)  # the curves lie on each other
        dashes = "--" if row["changes"] else "-"
        left.plot(steps, row["losses"], linewidth=wide, alpha=0.7, linestyle=dashes, **style)
        if base is not None and not row["reference"] and not row["changes"]:
            apart = [
                max(abs(a - b) / abs(b), 1e-9) for a, b in zip(row["losses"], base, strict=True)
            ]
            right.plot(steps, apart, marker="o", markersize=3, **style)
    left.set_ylabel("loss (nats a token)")
    left.set_xlabel("step")
    left.legend(fontsize=7)
    right.set_yscale("log")
    right.set_ylim(5e-10, 1)
    right.set_ylabel("relative difference from one rank")
    right.set_xlabel("step (equal losses are drawn at 1e-9)")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)


def _bars(
    axes: Any, rows: Sequence[Mapping[str, Any]], key: str, unit: float, label: str, colors: Any
) -> None:
    """A bar a way; ways that failed keep their line and say how."""
    for place, row in enumerate(rows):
        if row["status"] != "ok":
            axes.text(0, place, f" {row['status']}", va="center", fontsize=8, color="firebrick")
            continue
        value = row[key] / unit
        error = None
        if key == "step_time_s" and row["seconds"]:
            error = [[value - min(row["seconds"])], [max(row["seconds"]) - value]]
        axes.barh(place, value, xerr=error, color=colors[row["label"]], alpha=0.85)
        axes.text(
            value,
            place,
            f" {value:,.2f}" if value < 10 else f" {value:,.0f}",
            va="bottom",
            fontsize=8,
        )
    axes.set_yticks(range(len(rows)), [row["label"] for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)  # the first on top, failed ones too
    axes.margins(x=0.15)
    axes.set_xlabel(label)
    axes.grid(axis="x", alpha=0.3)
