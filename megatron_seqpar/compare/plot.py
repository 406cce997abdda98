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


def plot(
    by_length: Mapping[str, Sequence[Mapping[str, Any]]],
    title: str,
    path: Path,
    longest: Mapping[str, Mapping[str, Any]] | None = None,
    limit: str = "",
) -> None:
    """One line of panels a sequence length: losses, their differences, time, memory, bytes.

    longest: what `compare.longest` found for each way, drawn below them; limit: the memory it had.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = len(by_length) + bool(longest)
    figure = pyplot.figure(figsize=(24, 1.2 + 4.2 * lines), layout="constrained")
    grid = figure.add_gridspec(lines, 5)
    for index, (length, rows) in enumerate(by_length.items()):
        line = [figure.add_subplot(grid[index, column]) for column in range(5)]
        colors = _colors([row["label"] for row in rows])
        _losses(line[0], line[1], rows, colors)
        line[0].set_title(f"{int(length):,} tokens a sequence")
        for axes, (key, unit, label) in zip(line[2:], _BARS, strict=True):
            _bars(axes, rows, key, unit, label, colors)
        for axes in line[3:]:
            axes.set_yticklabels([])
    if longest:
        labels = [row["label"] for row in next(iter(by_length.values()))]
        # under the bars of times, whose labels are these
        _longest(figure.add_subplot(grid[-1, 2:]), longest, limit, _colors(labels))
    figure.suptitle(title)
    save_picture(figure, path)
    pyplot.close(figure)


def _colors(labels: Sequence[str]) -> dict[str, str]:
    """A colour for each way, the same in every panel."""
    return {label: f"C{index % 10}" for index, label in enumerate(labels)}


def _longest(
    axes: Any, found: Mapping[str, Mapping[str, Any]], limit: str, colors: Mapping[str, str]
) -> None:
    """A bar a way: tokens of the longest sequence that trained."""
    for place, (label, each) in enumerate(found.items()):
        if each["tokens"] is None:
            axes.text(0, place, f" {each['why']}", va="center", fontsize=8, color="firebrick")
            continue
        axes.barh(place, each["tokens"], color=colors[label], alpha=0.85)
        most = ">= " if each["at_least"] else ""
        axes.text(each["tokens"], place, f" {most}{each['tokens']:,}", va="center", fontsize=8)
    axes.set_yticks(range(len(found)), list(found), fontsize=8)
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.margins(x=0.1)
    axes.set_xlabel(f"tokens of the longest sequence that trains: {limit}")
    axes.grid(axis="x", alpha=0.3)


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
