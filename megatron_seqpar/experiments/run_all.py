# SPDX-License-Identifier: Apache-2.0
"""Run an experiment's jobs one after the other, each leaving its row; reuse rows that are there."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_seqpar.experiments.execute import Outcome, execute
from megatron_seqpar.experiments.job import Job
from megatron_seqpar.experiments.numbers import numbers
from megatron_seqpar.experiments.store import Store

Runner = Callable[[Job, Path, Callable[[str], None]], Outcome]


def run_job(
    job: Job,
    store: Store,
    data: str,
    facts: Mapping[str, Any],
    show: Callable[[str], None],
    *,
    header: str = "",
    again: bool = False,
    runner: Runner = execute,
) -> dict[str, Any]:
    """The row of a job: what is stored of it, or else what running it gives.

    facts: entries of the row that do not come of the run (its layout, its label).
    header: the line shown before; says whether the row was reused.
    again: run also what ended with an error or out of memory (what is ok stays).
    """
    key = job.key(data)

    def stored() -> dict[str, Any] | None:
        row = store.find(job.name, key)
        return None if row is None or (again and row["status"] != "ok") else row

    row = stored()
    if row is None:
        with store.turn(show):
            row = stored()  # the other command may have run it meanwhile
            if row is None:
                show(header)
                folder = store.place(job.name, key)
                started = time.monotonic()
                outcome = runner(job, folder, lambda line: show(f"    {line}"))
                return store.save(job.name, key, _row(job, outcome, folder, started, facts))
    show(f"{header}: {row['status']}, stored before")
    return row


def refused(name: str, why: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The row of a layout that cannot be run, with the constraint that it breaks."""
    return {"name": name, "status": "error", "reason": why, "refused": True, **facts}


def _row(
    job: Job, outcome: Outcome, folder: Path, started: float, facts: Mapping[str, Any]
) -> dict[str, Any]:
    row = {
        "name": job.name,
        "status": outcome.status,
        "reason": outcome.reason,
        "refused": outcome.status == "error" and outcome.steps_seen == 0,
        "ranks": job.ranks,
        "command": job.shell(),
        "log": str(folder / "log.txt"),
        "wall_s": time.monotonic() - started,
        **facts,
    }
    return {**row, **numbers(outcome.report)} if outcome.status == "ok" else row
