# SPDX-License-Identifier: Apache-2.0
"""Tables and picture of the collectives benchmark."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from rich.table import Table

from . import drawing


def human(size: float) -> str:
    """`4 MiB` for 4194304: bytes in the unit that leaves the fewest digits."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:.4g} {name}"
    return f"{size:.0f} B"


def table(result: dict[str, Any]) -> Table:
    """One line an operation and size; of messages the median pair and the slowest."""
    place = result["settings"]
    shown = Table(
        title=f"{result['ranks']} ranks, {result['backend']}, medians of {place['rounds']} rounds",
        caption="bandwidth: bytes that a rank must send / seconds",
    )
    for name in ("operation", "bytes", "us", "GB/s", "GB/s, slowest pair"):
        shown.add_column(name, justify="left" if name == "operation" else "right")
    last = None
    for (operation, within, size), rows in _groups(result["rows"]).items():
        name = _named(operation, within, result)
        if last not in (None, name):
            shown.add_section()
        last = name
        pairs = [row["bandwidth"] for row in rows]
        shown.add_row(
            name,
            human(size),
            f"{1e6 * statistics.median(row['seconds'] for row in rows):,.1f}",
            f"{statistics.median(pairs) / 1e9:.3g}",
            f"{min(pairs) / 1e9:.3g}" if len(rows) > 1 else "",
        )
    return shown


def _groups(rows: list[dict[str, Any]]) -> dict[tuple[str, bool, int], list[dict[str, Any]]]:
    found: dict[tuple[str, bool, int], list[dict[str, Any]]] = {}
    for key in dict.fromkeys((row["operation"], row["within_node"]) for row in rows):
        for row in rows:
            if (row["operation"], row["within_node"]) == key:
                found.setdefault((*key, row["bytes"]), []).append(row)
    return found


def _named(operation: str, within: bool, result: dict[str, Any]) -> str:
    if result["node_size"] in (result["ranks"], 1) or operation != "message":
        return operation
    return f"{operation}, {'within a node' if within else 'between nodes'}"


def fit_table(result: dict[str, Any]) -> Table:
    """The fits beside what the cluster's file says."""
    shown = Table(
        title=f"seconds = latency + sent / bandwidth, beside cluster {result['cluster']['name']}",
        caption=(
            "assumed: the file's link; its latency times the steps of a ring. "
            "error: of the fit, in the median and at worst"
        ),
    )
    for name in (
        "operation", "latency, us", "assumed, us", "bandwidth, GB/s", "assumed, GB/s", "error",
    ):  # fmt: skip
        shown.add_column(name, justify="left" if name == "operation" else "right")
    for fit in result["fits"]:
        name = _named(fit["operation"], fit["within_node"], result)
        assumed = f"{1e6 * fit['assumed_latency']:,.1f}", f"{fit['assumed_bandwidth'] / 1e9:.3g}"
        if "why_no_fit" in fit:
            shown.add_row(name, "", assumed[0], "no fit", assumed[1], "")
            continue
        shown.add_row(
            name,
            f"{1e6 * fit['latency']:,.1f}",
            assumed[0],
            f"{fit['bandwidth'] / 1e9:.3g}",
            assumed[1],
            f"{fit['median_error']:.0%}, {fit['worst_error']:.0%}",
        )
    return shown


def notes(result: dict[str, Any]) -> list[str]:
    """How the cluster was found, and why operations have no fit."""
    found = [f"{fit['operation']}: {fit['why_no_fit']}" for fit in result["fits"] if _lacks(fit)]
    note = result["cluster"]["note"]
    return [*([note] if note else []), *found]


def _lacks(fit: dict[str, Any]) -> bool:
    return "why_no_fit" in fit


def plot(result: dict[str, Any], path: Path) -> None:
    """Seconds and bandwidth against bytes; points are measured, lines are fitted."""
    figure, grid = drawing.figure(1, 2, (5.8, 4.4))
    left, right = grid[0]
    rows = result["rows"]
    sizes = sorted({row["bytes"] for row in rows})
    fits = {(fit["operation"], fit["within_node"]): fit for fit in result["fits"]}
    keys = list(dict.fromkeys((row["operation"], row["within_node"]) for row in rows))
    for index, key in enumerate(keys):
        mine = [row for row in rows if (row["operation"], row["within_node"]) == key]
        style = {"color": f"C{index}", "marker": "o", "markersize": 4, "linestyle": ""}
        name = _named(*key, result)
        at = [row["bytes"] for row in mine]
        left.plot(at, [1e6 * row["seconds"] for row in mine], label=name, **style)
        right.plot(at, [row["bandwidth"] / 1e9 for row in mine], label=name, **style)
        fit = fits[key]
        if "latency" in fit:
            by_size = sorted({row["bytes"]: row["bytes_sent_per_rank"] for row in mine}.items())
            xs = [size for size, _ in by_size]
            seconds = [fit["latency"] + moved / fit["bandwidth"] for _, moved in by_size]
            left.plot(xs, [1e6 * second for second in seconds], color=f"C{index}", linewidth=1)
            speeds = [m / s / 1e9 for (_, m), s in zip(by_size, seconds, strict=True)]
            right.plot(xs, speeds, color=f"C{index}", linewidth=1)
    for assumed in sorted({fit["assumed_bandwidth"] for fit in result["fits"]}):
        right.axhline(assumed / 1e9, color="grey", linestyle="--", linewidth=1)
        right.text(
            sizes[0], assumed / 1e9, f" link of {result['cluster']['name']}", va="bottom",
            color="grey", fontsize=8,
        )  # fmt: skip
    left.set_ylabel("us")
    drawing.logarithmic(left)
    right.set_ylabel("GB/s that a rank must send")
    right.set_ylim(bottom=0)
    for axes in (left, right):
        drawing.powers(axes, sizes, "bytes", [human(size) for size in sizes])
        axes.tick_params(axis="x", rotation=40)
    drawing.legend(figure, [left])
    figure.suptitle(
        f"{result['ranks']} ranks, {result['backend']}: points measured, lines fitted", fontsize=11
    )
    drawing.save(figure, path)
