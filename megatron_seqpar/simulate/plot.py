# SPDX-License-Identifier: Apache-2.0
"""Draw a timeline: per rank what it computes and waits for, and below it what its ports carry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import SeqParError
from .timeline import EventKind, Timeline

_LANE_COLOURS = {
    EventKind.COMPUTE: "#7fb5e6",
    EventKind.MERGE: "#2c7a4b",
    EventKind.POST: "#4a4f57",
    EventKind.WAIT: "#e4572e",
}
_PORT_COLOURS = {EventKind.SEND: "#f5b971", EventKind.RECEIVE: "#b08bd6"}
_LABELS = {
    EventKind.COMPUTE: "tiles",
    EventKind.MERGE: "merges",
    EventKind.POST: "posting",
    EventKind.WAIT: "waiting for transfers",
    EventKind.SEND: "sending",
    EventKind.RECEIVE: "receiving",
}
_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
# of a rank's row: what the rank does above, what its ports carry below (top, height)
_LANES = {
    EventKind.COMPUTE: (-0.42, 0.42),
    EventKind.MERGE: (-0.42, 0.42),
    EventKind.POST: (-0.42, 0.42),
    EventKind.WAIT: (-0.42, 0.42),
    EventKind.SEND: (0.04, 0.17),
    EventKind.RECEIVE: (0.23, 0.17),
}


def save_plot(timelines: tuple[Timeline, ...] | Timeline, path: Path) -> None:
    """Draw one timeline, or several (both passes) one below the other, in a file.

    Raises `SeqParError` without matplotlib, without events, or when the file cannot be written;
    its suffix is the format.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SeqParError("drawing a timeline needs matplotlib: pip install matplotlib") from None
    shown = timelines if isinstance(timelines, tuple) else (timelines,)
    if not shown or not all(timeline.events for timeline in shown):
        raise SeqParError("nothing to draw: simulate with events=True")
    heights = [0.9 + max(1.6, 0.42 * timeline.size) for timeline in shown]
    figure = Figure(figsize=(12, 0.6 + sum(heights)), layout="constrained")
    rows = figure.subplots(len(shown), 1, squeeze=False, height_ratios=heights)
    for axes, timeline in zip(rows[:, 0], shown, strict=True):
        _draw(axes, timeline)
    _legend(figure)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as failure:  # ValueError: not a format of matplotlib's
        raise SeqParError(f"drawing {path}: {failure}") from None


def title(timeline: Timeline) -> str:
    """The schedule, the cluster, how long it takes and what share of it is waiting."""
    scale, unit = _unit(timeline.makespan)
    how = "" if timeline.overlap else ", no overlap"
    return (
        f"{timeline.schedule}, {timeline.direction} on {timeline.cluster}, "
        f"P = {timeline.size}, {timeline.dtype}{how}: {timeline.makespan / scale:.3g} {unit}, "
        f"{timeline.wait_share:.1%} waiting, {timeline.idle_fraction:.1%} outside tiles"
    )


def _unit(seconds: float) -> tuple[float, str]:
    return next((unit for unit in _UNITS if seconds >= unit[0]), _UNITS[-1])


def _draw(axes: Any, timeline: Timeline) -> None:
    scale, unit = _unit(timeline.makespan)
    for kind, (top, height) in _LANES.items():
        colour = {**_LANE_COLOURS, **_PORT_COLOURS}[kind]
        for rank, events in enumerate(timeline.events):
            bars = [(e.start / scale, e.seconds / scale) for e in events if e.kind is kind]
            # white edges keep one bar from the next; of a thin bar they would leave nothing
            thin = any(width < timeline.makespan / scale / 300 for _, width in bars)
            axes.broken_barh(
                bars,
                (rank + top, height),
                facecolor=colour,
                edgecolor=colour if thin else "white",
                linewidth=0.3,
            )
    for rank, finish in enumerate(timeline.finish):
        axes.plot([finish / scale] * 2, [rank - 0.46, rank + 0.44], color="#4a4f57", linewidth=0.8)
    axes.set_xlim(0, timeline.makespan / scale * 1.005 or 1.0)
    axes.set_ylim(timeline.size - 0.5, -0.55)
    every = -(-timeline.size // 16)
    ranks = range(0, timeline.size, every)
    axes.set_yticks(list(ranks), [f"rank {rank}" for rank in ranks], fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel(unit, fontsize=8)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.set_title(title(timeline), fontsize=10, loc="left")


def _legend(figure: Any) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    colours = {**_LANE_COLOURS, **_PORT_COLOURS}
    handles: list[Any] = [Patch(facecolor=colours[kind], label=_LABELS[kind]) for kind in _LANES]
    handles.append(Line2D([], [], color="#4a4f57", linewidth=0.8, label="the rank is done"))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False
    )
