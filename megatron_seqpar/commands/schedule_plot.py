# SPDX-License-Identifier: Apache-2.0
"""Draw a schedule: the attention matrix by who computes what, and the steps of all ranks.

Left, the matrix of query chunks x key chunks: a cell's colour is its route, its text the rank that
computes it and the step. Right, time: one row a rank, one column a step, tiles as wide as they
take; white within a column is idle time. The lanes between columns hold the transfers that move
*while* the column on their left is computed: from the sender's row to the receiver's.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_seqpar.attention import Payload, Region, Route, Schedule, Step
from megatron_seqpar.attention.ir import item_size
from megatron_seqpar.errors import SeqParError

from .schedule_report import TileNames, describe, human_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROUTE_COLOURS = {
    Route.LOCAL: "#c9ced6",
    Route.KV: "#7fb5e6",
    Route.Q: "#f5b971",
    Route.BOTH: "#c79be0",
}
ROUTE_NAMES = {
    Route.LOCAL: "local tile",
    Route.KV: "KV-route tile (keys and values came)",
    Route.Q: "Q-route tile (queries came)",
    Route.BOTH: "tile with both operands received",
}
PAYLOAD_COLOURS = {
    Payload.KV: "#1f5fa8",
    Payload.Q: "#c4640a",
    Payload.Q_GRAD: "#c4640a",
    Payload.OUT: "#8a1f3d",
    Payload.DQ: "#8a1f3d",
    Payload.DKV: "#2c7a4b",
}
PAYLOAD_NAMES = {
    Payload.KV: "keys and values",
    Payload.Q: "queries",
    Payload.Q_GRAD: "queries, output gradient, LSE, delta",
    Payload.OUT: "partial output and LSE",
    Payload.DQ: "partial query gradient",
    Payload.DKV: "partial key and value gradients",
}
_EDGE = "#4a4f57"
_LANE = 0.85  # width of the lane of transfers, in units of a whole tile's time
_EMPTY_STEP = 0.12  # width of a column that only moves data
_MOST_LABELLED = 20  # above, text would not fit
_LEAST_LABELLED = 0.3  # of a chunk; nor below


def save(schedule: Schedule, dtype: str, path: Path) -> None:
    """Draw one pass in a file; the suffix is the format. `SeqParError` if that cannot be done."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SeqParError("--plot needs matplotlib: pip install matplotlib") from None
    item_size(dtype)
    _check_path(path, Figure().canvas.get_supported_filetypes())
    columns = _columns(schedule)
    size = schedule.size
    height = 2.2 + max(3.0, 0.52 * size)
    matrix_width = max(3.0, 0.52 * size)
    time_width = max(6.0, 1.05 * (columns[-1][1] + _LANE))
    figure = Figure(figsize=(matrix_width + time_width + 1.4, height), layout="constrained")
    matrix, time = figure.subplots(1, 2, width_ratios=(matrix_width, time_width))
    _draw_matrix(matrix, schedule)
    _draw_time(time, schedule, columns)
    figure.suptitle(_title(schedule, dtype), fontsize=11)
    _legend(figure, schedule)
    try:
        figure.savefig(path, dpi=120)
    except OSError as failure:
        raise SeqParError(f"--plot {path}: {failure}") from None


def _check_path(path: Path, formats: Iterable[str]) -> None:
    if not path.absolute().parent.is_dir():
        raise SeqParError(f"--plot {path}: there is no folder {path.parent}")
    if path.suffix.lstrip(".").lower() not in formats:
        raise SeqParError(
            f"--plot {path}: the name must end in one of {', '.join(sorted(formats))}"
        )


def _title(schedule: Schedule, dtype: str) -> str:
    sent = [schedule.bytes_sent(rank, dtype=dtype) for rank in range(schedule.size)]
    mean = human_bytes(sum(sent) / len(sent))
    return (
        f"{describe(schedule, dtype)}\n{schedule.direction}: idle fraction "
        f"{schedule.idle_fraction:.4f}; a rank sends {mean} (mean), "
        f"{human_bytes(max(sent))} (most)"
    )


# ---- the matrix -----------------------------------------------------------------------------


def _draw_matrix(axes: Axes, schedule: Schedule) -> None:
    from matplotlib.patches import Polygon

    pieces = [
        (piece, rank)
        for rank, pieces in enumerate(schedule.problem.layout.pieces)
        for piece in pieces
    ]
    total = schedule.problem.layout.seq_length
    size = schedule.size
    labelled = size <= _MOST_LABELLED
    labels: dict[Region, list[str]] = {}
    for rank, steps in enumerate(schedule.plan):
        for index, step in enumerate(steps):
            for tile in step.tiles:
                colour = ROUTE_COLOURS[schedule.problem.route(rank, tile)]
                shape = Polygon(outline(tile.region), facecolor=colour, edgecolor=_EDGE)
                shape.set_linewidth(0.6)
                axes.add_patch(shape)
                labels.setdefault(tile.region, []).append(f"{rank}@{index}")
    for region, names in labels.items() if labelled else ():
        room = min(region.q.size, region.kv.size) * size / total  # in chunks
        if room >= _LEAST_LABELLED:
            corners = outline(region)
            axes.text(
                sum(x for x, _ in corners) / len(corners),
                sum(y for _, y in corners) / len(corners),
                names[0] if len(names) == 1 else f"{names[0]} +{len(names) - 1}",
                ha="center",
                va="center",
                fontsize=_font(size) - (1.5 if room < 1 or region.high is not None else 0),
            )
    axes.set_xlim(0, total)
    axes.set_ylim(total, 0)
    axes.set_aspect("equal")
    shown = [(piece, rank) for piece, rank in pieces if labelled or rank % 4 == 0]
    ticks = [(piece.start + piece.stop) / 2 for piece, _ in shown]
    names = [str(rank) for _, rank in shown]
    axes.set_xticks(ticks, names, fontsize=8)
    axes.set_yticks(ticks, names, fontsize=8)
    axes.tick_params(length=0)
    axes.set_xlabel("key chunk (its owner)", fontsize=9)
    axes.set_ylabel("query chunk (its owner)", fontsize=9)
    axes.set_title("rank@step that computes a tile", fontsize=9)


def outline(region: Region) -> list[tuple[float, float]]:
    """Corners of a tile as (key, query) positions: a rectangle cut by its band of diagonals."""
    (top, bottom), (left, right), low, high = region
    rows: set[float] = {top, bottom}
    for edge, limit in ((right, high), (left, low)):
        if limit is not None and top < edge - limit < bottom:
            rows.add(edge - limit)
    ends = [(row, right if high is None else min(right, row + high)) for row in sorted(rows)]
    starts = [(row, left if low is None else max(left, row + low)) for row in sorted(rows)]
    return [(x, row) for row, x in ends] + [(x, row) for row, x in reversed(starts)]


# ---- time -----------------------------------------------------------------------------------


def _work(step: Step) -> int:
    return sum(tile.work for tile in step.tiles)


def _columns(schedule: Schedule) -> list[tuple[float, float]]:
    """(start, stop) of every step; the longest tile of the schedule takes one unit of time."""
    slowest = [max(map(_work, together)) for together in zip(*schedule.plan, strict=True)]
    unit = max(slowest)
    columns, at = [], 0.0
    for work in slowest:
        width = max(work / unit, _EMPTY_STEP)
        columns.append((at, at + width))
        at += width + _LANE
    return columns


def _draw_time(axes: Axes, schedule: Schedule, columns: list[tuple[float, float]]) -> None:
    names = TileNames(schedule) if schedule.size <= _MOST_LABELLED else None
    for index, (start, stop) in enumerate(columns):
        together = [steps[index] for steps in schedule.plan]
        slowest = max(map(_work, together))
        for rank, step in enumerate(together):
            routes = [schedule.problem.route(rank, tile) for tile in step.tiles]
            _draw_step(axes, names, rank, step, routes, (start, stop), slowest)
            for transfer in step.sends:
                _draw_transfer(axes, transfer.src, transfer.dst, stop, transfer.payload)
    end = columns[-1][1]
    if any(steps[-1].sends for steps in schedule.plan):
        end += _LANE
        axes.plot([end, end], [-0.36, schedule.size - 0.64], color="#b9bec6", linewidth=1)
    axes.set_xlim(-0.06, end + 0.06)
    axes.set_ylim(schedule.size - 0.45, -0.55)
    axes.set_xticks(
        [(start + stop) / 2 for start, stop in columns],
        [f"step {index}" for index in range(len(columns))],
        fontsize=8,
    )
    every = 1 if schedule.size <= _MOST_LABELLED else 4
    ranks = range(0, schedule.size, every)
    axes.set_yticks(list(ranks), [f"rank {rank}" for rank in ranks], fontsize=8)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    parts = "; letters: parts of a chunk" if names is not None and names.any_cut else ""
    axes.set_title(
        f"query chunk × key chunk of each step{parts}\narrows: what moves while the column on "
        "their left computes",
        fontsize=9,
    )


def _draw_step(
    axes: Axes,
    names: TileNames | None,
    rank: int,
    step: Step,
    routes: list[Route],
    column: tuple[float, float],
    slowest: int,
) -> None:
    from matplotlib.patches import Rectangle

    start, stop = column
    box = Rectangle(
        (start, rank - 0.36), stop - start, 0.72, facecolor="white", edgecolor="#b9bec6",
        linewidth=0.5, linestyle=":",
    )  # fmt: skip
    axes.add_patch(box)
    at = start
    for tile, route in zip(step.tiles, routes, strict=True):
        width = (stop - start) * tile.work / slowest
        colour = ROUTE_COLOURS[route]
        axes.add_patch(
            Rectangle(
                (at, rank - 0.36), width, 0.72, facecolor=colour, edgecolor=_EDGE, linewidth=0.6
            )
        )
        if names is not None and width > 0.045 * len(names(tile)):
            axes.text(at + width / 2, rank, names(tile), ha="center", va="center", fontsize=8)
        at += width
    if not step.tiles and slowest:
        axes.text(
            (start + stop) / 2, rank, "idle", ha="center", va="center", fontsize=6.5,
            color="#9aa0a8", style="italic",
        )  # fmt: skip


def _draw_transfer(axes: Axes, src: int, dst: int, lane_start: float, payload: Payload) -> None:
    arrow = axes.annotate(
        "",
        xy=(lane_start + _LANE - 0.02, dst),
        xytext=(lane_start + 0.02, src),
        arrowprops={
            "arrowstyle": "-|>",
            "mutation_scale": 7,
            "color": PAYLOAD_COLOURS[payload],
            "linewidth": 0.9,
            "alpha": 0.85,
            "shrinkA": 0,
            "shrinkB": 0,
            "linestyle": "-" if payload in (Payload.KV, Payload.DKV) else (0, (4, 1.5)),
        },
    )
    arrow.set_in_layout(False)  # arrows end inside the axes; measuring hundreds takes seconds


def _font(size: int) -> float:
    return 8.0 if size <= 10 else 6.5


def _legend(figure: Any, schedule: Schedule) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    tiles = [(rank, t) for rank, steps in enumerate(schedule.plan) for s in steps for t in s.tiles]
    routes = {schedule.problem.route(rank, tile) for rank, tile in tiles}
    payloads = {t.payload for steps in schedule.plan for step in steps for t in step.sends}
    handles: list[Any] = [
        Patch(facecolor=ROUTE_COLOURS[route], edgecolor=_EDGE, label=ROUTE_NAMES[route])
        for route in Route
        if route in routes
    ]
    handles += [
        Line2D([], [], color=PAYLOAD_COLOURS[p], label=PAYLOAD_NAMES[p],
               linestyle="-" if p in (Payload.KV, Payload.DKV) else (0, (4, 1.5)))
        for p in Payload
        if p in payloads
    ]  # fmt: skip
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(len(handles), 4), fontsize=8,
        frameon=False,
    )  # fmt: skip
