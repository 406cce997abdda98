# SPDX-License-Identifier: Apache-2.0
"""What `auto` chose from what, as a table for people and as a dictionary for programs."""

from __future__ import annotations

import shutil
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_seqpar.attention.schedules import BUILDERS
from megatron_seqpar.attention.schedules.auto import MANY_REGIONS, Candidate, Choice, milliseconds

from .schedule_report import human_bytes


def print_choice(choice: Choice, *, everything: bool) -> None:
    """Print why, and with `everything` the table of all candidates and why others are not in it."""
    # a pipe wraps nothing
    terminal = shutil.get_terminal_size().columns if sys.stdout.isatty() else 120
    console = Console(width=max(110, terminal))
    if everything:
        console.print(_table(choice))
        for candidate in choice.candidates:
            if candidate.schedule is None:
                console.print(f"left out: {candidate.refusal}", highlight=False, style="dim")
        _print_untried(console, choice)
    goal = "least time" if choice.objective == "time" else "fewest bytes"
    console.print(f"auto ({goal}) takes {choice.why()}", highlight=False, style="bold")


def _print_untried(console: Console, choice: Choice) -> None:
    """Say which schedules were not built, and why."""
    others = [name for name in BUILDERS if name not in {c.name for c in choice.candidates}]
    if others:
        reason = f"masks of more than {MANY_REGIONS} regions get what is quick to plan"
        if choice.schedule.size == 1:
            reason = "one rank computes all"
        console.print(f"not tried, {reason}: {', '.join(others)}", highlight=False, style="dim")


def _table(choice: Choice) -> Table:
    timed = choice.cluster is not None
    where = "" if choice.cluster is None else f" on {choice.cluster.name}, predicted"
    table = Table(title=f"candidates of auto, forward and backward of one call{where}")
    headers = ["schedule", "idle, steps", "sent, mean", "sent, busiest"]
    headers += ["time", "of best", "not computing", "exposed transfers"] if timed else ["of best"]
    for header in headers:
        left = header == "schedule"
        table.add_column(header, justify="left" if left else "right", no_wrap=left)
    best = choice.candidates[0]
    for candidate in choice.candidates:
        if candidate.schedule is not None:
            table.add_row(*_cells(candidate, best), style="bold" if candidate is best else "")
    return table


def _cells(candidate: Candidate, best: Candidate) -> list[str]:
    schedule = candidate.schedule
    assert schedule is not None
    cells = [
        candidate.name,
        f"{100 * schedule.idle_fraction:.1f}%",
        human_bytes(candidate.bytes_total / schedule.size),
        human_bytes(candidate.bytes_busiest),
    ]
    predicted = candidate.prediction
    if predicted is None or best.prediction is None:
        return [*cells, f"{candidate.bytes_total / max(1, best.bytes_total):.2f}"]
    return [
        *cells,
        milliseconds(predicted.total_s),
        f"{predicted.total_s / best.prediction.total_s:.2f}",
        f"{100 * predicted.idle_fraction:.1f}%",
        f"{100 * predicted.exposed_share:.1f}%",
    ]


def choice_as_dict(choice: Choice) -> dict[str, Any]:
    """All candidates, the best first; bytes and seconds of both passes."""
    return {
        "objective": choice.objective,
        "cluster": None if choice.cluster is None else choice.cluster.name,
        "why": choice.why(),
        "candidates": [
            {
                "schedule": candidate.name,
                "refusal": candidate.refusal or None,
                "idle_fraction": candidate.schedule and candidate.schedule.idle_fraction,
                "bytes_total": candidate.bytes_total,
                "bytes_busiest": candidate.bytes_busiest,
                "seconds": candidate.prediction and candidate.prediction.total_s,
                "exposed_share": candidate.prediction and candidate.prediction.exposed_share,
            }
            for candidate in choice.candidates
        ],
    }
