# SPDX-License-Identifier: Apache-2.0
"""The picture of `overlap.py`: step times, and what the ranks did in two traced steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from overlap_rank import case_name

from megatron_seqpar.telemetry import trace

COLOURS = {"tile": "tab:blue", "wait": "lightgrey", "receive": "tab:orange"}
WAYS = {"no_overlap": "without overlap", "overlap": "with overlap"}


def save(cases: list[dict[str, Any]], folder: Path, path: Path) -> None:
    """Draw the cases; `folder` holds the traces of their last steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(12, 3.2 + 1.7 * len(cases)), layout="constrained")
    rows = figure.add_gridspec(len(cases) + 1, 2, height_ratios=[1.5, *[1] * len(cases)])
    _times(figure.add_subplot(rows[0, :]), cases)
    for number, case in enumerate(cases, start=1):
        longest = max(case["traced"][way]["step"] for way in WAYS)
        for column, (way, label) in enumerate(WAYS.items()):
            axes = figure.add_subplot(rows[number, column])
            name = case_name(case["schedule"], case["mask"], case["ranks_per_host"])
            _timeline(axes, trace.merged_path(folder / f"{name}-{way}"))
            axes.set_title(f"{_title(case)}, {label}", fontsize=9)
            axes.set_xlim(0, longest * 1.05)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
    names = ["computes tiles", "waits", "receives (thin)"]
    figure.legend(handles, names, loc="outside lower center", ncols=3, fontsize=8)
    figure.suptitle("Attention between two pretended hosts, transfers as long as tiles")
    figure.savefig(path, dpi=140)


def _title(case: dict[str, Any]) -> str:
    mask = case["mask"].partition(":")[0]
    return f"{case['schedule']}, {mask}, {case['ranks']} ranks"


def _times(axes: Any, cases: list[dict[str, Any]]) -> None:
    for way, shift, colour in (("no_overlap", -0.2, "tab:red"), ("overlap", 0.2, "tab:green")):
        places = [number + shift for number in range(len(cases))]
        measured = [case["seconds"][way]["step"] for case in cases]
        simulated = [case["simulated_seconds"][way]["step"] for case in cases]
        axes.bar(places, measured, 0.36, color=colour, alpha=0.75, label=WAYS[way])
        known = {"label": "simulated"} if way == "overlap" else {}
        axes.scatter(places, simulated, marker="_", s=900, color="black", zorder=3, **known)
    for number, case in enumerate(cases):
        best = max(case["seconds"][way]["step"] for way in WAYS)
        text = f"{case['ratio']['step']:.2f} x (at best {case['bound']:.2f})"
        axes.text(number, best * 1.04, text, ha="center", fontsize=9)
    axes.set_xticks(
        range(len(cases)), [_title(case).replace(", ", "\n") for case in cases], fontsize=8
    )
    axes.set_ylabel("seconds a step")
    axes.margins(y=0.15)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8)


def _timeline(axes: Any, path: Path) -> None:
    """What every rank did: tiles and waits as a bar, what it received as a thin one below."""
    content = trace.read(path)
    bars = [event for event in content["traceEvents"] if event["ph"] == "X"]
    ranks = sorted({bar["pid"] for bar in bars})
    for bar in bars:
        colour = COLOURS.get(bar["args"]["kind"])
        if colour is None:
            continue
        thin = bar["args"]["kind"] == "receive"
        low, height = (bar["pid"] + 0.32, 0.16) if thin else (bar["pid"] - 0.32, 0.6)
        axes.broken_barh([(bar["ts"] / 1e6, bar["dur"] / 1e6)], (low, height), color=colour)
    axes.set_yticks(ranks, [f"rank {rank}" for rank in ranks], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("seconds", fontsize=8)
    axes.tick_params(axis="x", labelsize=7)
