# SPDX-License-Identifier: Apache-2.0
"""A schedule as tables for people and as a dictionary for programs."""

from __future__ import annotations

import shutil
import sys
from collections import defaultdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_seqpar.attention import Route, Schedule, Span, Step, Tile, Transfer
from megatron_seqpar.attention.ir import item_size

ROUTE_STYLES = {
    Route.LOCAL: "white",
    Route.KV: "bold cyan",
    Route.Q: "bold yellow",
    Route.BOTH: "bold magenta",
}
MOST_RANKS_OF_GRID = 16
_CELL = 13  # columns of the terminal that one step needs


def print_report(schedule: Schedule, shown: Schedule, dtype: str) -> None:
    """Print both passes' totals of `schedule`, and the steps of `shown` (one of its passes)."""
    item_size(dtype)  # an unknown dtype fails before anything is printed
    steps = len(shown.plan[0])
    terminal = shutil.get_terminal_size().columns if sys.stdout.isatty() else 120
    # a pipe wraps nothing, so the grid may be as wide as it needs to be
    console = Console(width=max(terminal, _CELL * (steps + 1)))
    console.print(describe(schedule, dtype), highlight=False, style="bold")
    if schedule.size <= MOST_RANKS_OF_GRID:
        console.print(_grid(shown))
        console.print(
            f"{shown.direction}: tiles are query chunk × key chunk, ",
            Text("local", ROUTE_STYLES[Route.LOCAL]), ", ",
            Text("KV-route", ROUTE_STYLES[Route.KV]), " or ",
            Text("Q-route", ROUTE_STYLES[Route.Q]),
            "; below them what the rank sends while it computes, and to whom",
            "; letters: parts of a chunk" if TileNames(shown).any_cut else "",
            sep="", highlight=False,
        )  # fmt: skip
    else:
        console.print(f"steps are printed for up to {MOST_RANKS_OF_GRID} ranks; --json has all")
    console.print(_totals(schedule, dtype))
    console.print(_proof(schedule), highlight=False)


def describe(schedule: Schedule, dtype: str) -> str:
    """One line: the builder's name and the problem."""
    problem = schedule.problem
    lengths = problem.layout.lengths
    even = f"{lengths[0]:,} a rank" if len(set(lengths)) == 1 else f"{min(lengths):,} to "
    even += "" if len(set(lengths)) == 1 else f"{max(lengths):,} a rank"
    return (
        f"{schedule.name}, P = {schedule.size}, {problem.mask.name} mask, "
        f"{problem.layout.seq_length:,} tokens ({even}), {problem.query_heads} query heads and "
        f"{problem.kv_heads} KV heads of {problem.head_dim}, {dtype}"
    )


class TileNames:
    """Short names of tiles, "query chunk × key chunk" by owner.

    Letters mark the parts of a piece, hN-M the query heads where a tile has not all.
    """

    def __init__(self, schedule: Schedule) -> None:
        self._problem = schedule.problem
        layout = schedule.problem.layout
        pieces = {piece for pieces in layout.pieces for piece in pieces}
        tiles = {tile for steps in schedule.plan for step in steps for tile in step.tiles}
        cut: dict[tuple[int, ...], set[Span]] = defaultdict(set)
        for span in {span for tile in tiles for span in (tile.q, tile.kv)} - pieces:
            cut[self._owners(span)].add(span)
        for owners, spans in list(cut.items()):
            if len(owners) > 1 and len(spans) == 1:
                del cut[owners]  # a range of several owners needs no letter when it is the only one
        self.any_cut = bool(cut)
        self._letters = {
            span: _letters(index)
            for spans in cut.values()
            for index, span in enumerate(sorted(spans))
        }

    def _owners(self, span: Span) -> tuple[int, ...]:
        return tuple(dict.fromkeys(rank for rank, _ in self._problem.layout.split(span)))

    def _name(self, span: Span) -> str:
        owners = self._owners(span)
        name = str(owners[0]) if len(owners) == 1 else f"{min(owners)}-{max(owners)}"
        return name + self._letters.get(span, "")

    def __call__(self, tile: Tile) -> str:
        """The name of one tile."""
        heads = tile.heads
        part = "" if heads == self._problem.all_heads else f" h{heads.start}-{heads.stop - 1}"
        return f"{self._name(tile.q)}×{self._name(tile.kv)}{part}"


def _letters(index: int) -> str:
    """a, b, ..., z, aa, ab, ..."""
    name = chr(ord("a") + index % 26)
    return name if index < 26 else _letters(index // 26 - 1) + name


def _grid(shown: Schedule) -> Table:
    table = Table(show_lines=True)
    table.add_column("rank", justify="right")
    for index in range(len(shown.plan[0])):
        table.add_column(f"step {index}", no_wrap=True)
    names = TileNames(shown)
    for rank in range(shown.size):
        table.add_row(str(rank), *(_cell(shown, rank, step, names) for step in shown.steps(rank)))
    return table


def _cell(shown: Schedule, rank: int, step: Step, names: TileNames) -> Text:
    lines = [Text(names(t), ROUTE_STYLES[shown.problem.route(rank, t)]) for t in step.tiles]
    if not step.tiles and any(t.tiles for t in shown.steps(rank)):
        lines.append(Text("-", "dim"))
    lines += [Text(f"{t.payload.value} → {t.dst}", "dim") for t in step.sends]
    return Text("\n").join(lines)


def _totals(schedule: Schedule, dtype: str) -> Table:
    table = Table()
    for header in (
        "rank", "tokens", "work (of mean)", "sent forward", "sent backward",
        "messages f / b", "peak received f / b",
    ):  # fmt: skip
        table.add_column(header, justify="right")
    mean = schedule.total_work / schedule.size
    for rank in range(schedule.size):
        peaks = [p.peak_received_bytes(rank, dtype) for p in (schedule, schedule.backward())]
        table.add_row(
            str(rank),
            f"{schedule.problem.layout.lengths[rank]:,}",
            f"{schedule.work(rank) / mean:.4f}",
            human_bytes(schedule.bytes_sent(rank, "forward", dtype)),
            human_bytes(schedule.bytes_sent(rank, "backward", dtype)),
            f"{schedule.messages_sent(rank, 'forward')} / "
            f"{schedule.messages_sent(rank, 'backward')}",
            " / ".join(human_bytes(peak) for peak in peaks),
        )
    return table


def _proof(schedule: Schedule) -> str:
    tiles = sum(len(step.tiles) for steps in schedule.plan for step in steps)
    return (
        f"idle fraction {schedule.idle_fraction:.6f} (all ranks step by step together, transfers "
        f"free)\nverified, forward and backward: {tiles} tiles cover every interacting pair once, "
        "every send has its receive, no deadlock, bounded buffers"
    )


def human_bytes(count: float) -> str:
    """Bytes with a binary unit and three digits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1000 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.3g} {unit}"


def as_dict(schedule: Schedule, dtype: str) -> dict[str, Any]:
    """The whole plan of both passes; spans are [start, stop) in global tokens, sizes in bytes."""
    problem = schedule.problem
    return {
        "schedule": schedule.name,
        "size": schedule.size,
        "seq_length": problem.layout.seq_length,
        "lengths": list(problem.layout.lengths),
        "mask": problem.mask.name,
        "query_heads": problem.query_heads,
        "kv_heads": problem.kv_heads,
        "head_dim": problem.head_dim,
        "dtype": dtype.removeprefix("torch."),
        "verified": schedule.verify() and schedule.backward().verify(),
        "idle_fraction": schedule.idle_fraction,
        "forward": [_rank(schedule, rank, dtype) for rank in range(schedule.size)],
        "backward": [_rank(schedule.backward(), rank, dtype) for rank in range(schedule.size)],
    }


def _rank(plan: Schedule, rank: int, dtype: str) -> dict[str, Any]:
    item = item_size(dtype)

    def owners(span: Span) -> list[int]:
        return list(dict.fromkeys(owner for owner, _ in plan.problem.layout.split(span)))

    def transfer(t: Transfer) -> dict[str, Any]:
        return {
            "payload": t.payload.value, "tokens": list(t.span), "heads": list(t.heads),
            "src": t.src, "dst": t.dst, "bytes": plan.problem.transfer_bytes(t, item),
        }  # fmt: skip

    def tile(t: Tile) -> dict[str, Any]:
        return {
            "queries": list(t.q), "keys": list(t.kv), "heads": list(t.heads),
            "query_owners": owners(t.q), "key_owners": owners(t.kv), "kind": t.kind.value,
            "low": t.low, "high": t.high, "route": plan.problem.route(rank, t).value,
            "pairs": t.pairs,
        }  # fmt: skip

    return {
        "rank": rank,
        "work": plan.work(rank),
        "bytes_sent": plan.bytes_sent(rank, dtype=dtype),
        "messages_sent": plan.messages_sent(rank),
        "peak_received_bytes": plan.peak_received_bytes(rank, dtype),
        "steps": [
            {
                "tiles": [tile(t) for t in step.tiles],
                "sends": [transfer(t) for t in step.sends],
                "receives": [transfer(t) for t in step.receives],
            }
            for step in plan.steps(rank)
        ],
    }
