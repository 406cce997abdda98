# SPDX-License-Identifier: Apache-2.0
"""Distributed attention against one rank on the same kernel: forward and backward together.

In every round come, in turn: one rank with the whole sequence while the others rest; the same on
all at once, each for itself (on a CPU cores share caches and memory, so this is slower); every
schedule. `efficiency` is one rank's time over P times a schedule's: 1 means that splitting costs
nothing. Against the busy machine it leaves out what the cores cost each other.

All ways compute the same attention: before anything is timed, each one's output and gradients are
compared with those of one rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..attention import Schedule, as_mask
from ..errors import KernelError, ScheduleError, SeqParError, UnsupportedError
from ..simulate import attention_flops
from .attention_cells import BUSY, ONE_RANK, Cell, Sizes, Way, plan_of
from .attention_rank import measure_cells
from .place import Place
from .ranks import Row, on_ranks
from .rounds import median_ratio, spread


def measure(
    places: Sequence[Place],
    kernels: Sequence[str],
    lengths: Sequence[int],
    ways: Sequence[Way],
    sizes: Sizes,
    rounds: int,
) -> list[Row]:
    """Rows of all places, kernels, lengths and ways, in this order.

    Raises SeqParError where nothing can be measured: no way serves the sizes, or the one kernel
    does not.
    """
    as_mask(sizes.mask)
    rows: list[Row] = []
    for place in places:
        cells, refused = [], []
        for kernel in kernels:
            for tokens in sorted(lengths):
                served, not_served = _served(place, tokens, ways, sizes)
                cells.append(Cell(kernel, tokens, served))
                refused.append(not_served)
        raws = _run(place, cells, sizes, rounds)
        for cell, raw, not_served in zip(cells, raws, refused, strict=False):
            if "refused" in raw and len(kernels) == 1:
                raise KernelError(raw["refused"])
            rows += rows_of(cell, raw, place, sizes)
            rows += [
                {**_key(cell, raw, place), "way": way.name, "status": "refused", "why": why}
                for way, why in not_served.items()
            ]
    return rows


def _served(
    place: Place, tokens: int, ways: Sequence[Way], sizes: Sizes
) -> tuple[tuple[Way, ...], dict[Way, str]]:
    """Ways that have a schedule here, and why the others have none."""
    served, refused = [], {}
    for way in ways if place.ranks > 1 else ():
        try:
            plan_of(way, place, tokens, sizes)
            served.append(way)
        except (ScheduleError, UnsupportedError) as why:
            refused[way] = str(why)
    if refused and not served:
        raise SeqParError("; ".join(dict.fromkeys(refused.values())))
    return tuple(served), refused


def _run(place: Place, cells: list[Cell], sizes: Sizes, rounds: int) -> list[Row]:
    """What ranks measured of each cell; a cell that memory does not suffice for ends its ranks."""
    done: list[Row] = []
    too_long: dict[str, int] = {}  # by kernel
    while len(done) < len(cells):
        cell = cells[len(done)]
        if cell.kernel in too_long:
            why = f"{too_long[cell.kernel]:,} tokens did not fit"
            done.append({"oom": why, "kernel": _resolved(cell.kernel, cells, done)})
            continue
        gathered = on_ranks(measure_cells, place, cells[len(done) :], sizes, place, rounds)
        done += gathered.rows
        if gathered.failure is None:
            return done
        if gathered.failure != "oom" or place.started:
            raise SeqParError(gathered.text)
        failed = cells[len(done)]
        too_long[failed.kernel] = failed.tokens
        kernel = _resolved(failed.kernel, cells, done)
        done.append({"oom": gathered.text.splitlines()[-1], "kernel": kernel})
    return done


def _resolved(kernel: str, cells: Sequence[Cell], done: Sequence[Row]) -> str:
    """What a kernel's name meant where it was measured: `auto` is none."""
    known = [str(raw["kernel"]) for cell, raw in zip(cells, done, strict=False)
             if cell.kernel == kernel]  # fmt: skip
    return known[0] if known else kernel


# ---- rows -----------------------------------------------------------------------------------


def _key(cell: Cell, raw: Row, place: Place) -> Row:
    kernel = raw.get("kernel", cell.kernel)
    return {"ranks": place.ranks, "kernel": kernel, "tokens": cell.tokens}


def rows_of(cell: Cell, raw: Row, place: Place, sizes: Sizes) -> list[Row]:
    """Rows of one cell from what its ranks measured."""
    key = _key(cell, raw, place)
    names = [ONE_RANK, *([BUSY] if place.ranks > 1 else [])]
    every: dict[str, Way | None] = {
        **dict.fromkeys(names), **{way.name: way for way in cell.ways}
    }  # fmt: skip
    for status in ("refused", "oom"):
        if status in raw:
            return [{**key, "way": name, "status": status, "why": raw[status]} for name in every]
    flops = _flops(cell.tokens, sizes)
    first = cell.ways[0].name if cell.ways else ONE_RANK
    rows = []
    for name, way in every.items():
        if name not in raw["calls"]:
            why = "one rank has not memory enough for the whole sequence"
            rows.append({**key, "way": name, "status": "oom", "why": why})
            continue
        times = spread([seconds[name] for seconds in raw["rounds"]])
        busy = place.ranks if way else 1  # ranks that share the work
        row = {**key, "way": name, "status": "ok", **times, "calls": raw["calls"][name]}
        row["tflops_per_rank"] = flops / times["seconds"] / busy / 1e12
        if way is not None:
            speedup = median_ratio(raw["rounds"], ONE_RANK, name)
            against_busy = median_ratio(raw["rounds"], BUSY, name)
            row |= {
                "efficiency": speedup and speedup / place.ranks,
                "efficiency_busy": against_busy and against_busy / place.ranks,
                "over_first": median_ratio(raw["rounds"], name, first),
                "largest_difference_from_one_rank": raw["differences"].get(name),
                **_counted(plan_of(way, place, cell.tokens, sizes), sizes),
            }
        rows.append(row)
    return rows


def _flops(tokens: int, sizes: Sizes) -> int:
    """FLOPs of both passes over the pairs that the mask leaves."""
    alone = Place("cpu", 1, 1)
    work = plan_of(Way("balanced"), alone, tokens, sizes).total_work
    dim = sizes.head_dim
    return sizes.batch * sum(
        attention_flops(work, 1, dim, dim, direction) for direction in ("forward", "backward")
    )


def _counted(plan: Schedule, sizes: Sizes) -> Row:
    """The schedule's own numbers."""
    sent = [
        plan.bytes_sent(rank, direction, sizes.dtype, batch=sizes.batch)
        for rank in range(plan.size)
        for direction in ("forward", "backward")
    ]
    return {
        "schedule": plan.name,
        "idle_fraction": plan.idle_fraction,
        "bytes_sent_per_rank": sum(sent) / plan.size,
        "tiles_per_rank": sum(len(s.tiles) for steps in plan.plan for s in steps) / plan.size,
    }


def settings(sizes: Sizes, rounds: int) -> dict[str, Any]:
    """What a result says of the tensors."""
    return {**asdict(sizes), "rounds": rounds, "passes": "forward and backward"}
