# SPDX-License-Identifier: Apache-2.0
"""The longest sequence that each way of a comparison trains in the same memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_seqpar.compare.config import LongestSection
from megatron_seqpar.experiments.job import Job
from megatron_seqpar.experiments.longest import OtherFailure, search
from megatron_seqpar.experiments.run_all import run_job
from megatron_seqpar.experiments.store import Store

STEPS = 2  # the optimizer's state is there from the first step's end
_CAPPED = Path(__file__).resolve().parents[1] / "bench" / "memory_rank.py"
_BLOCKS_RETURNED = (("MALLOC_ARENA_MAX", "2"), ("MALLOC_MMAP_THRESHOLD_", str(2**20)))


def longest(
    job_of: Callable[[int], Job],
    section: LongestSection,
    store: Store,
    data: str,
    show: Callable[[str], None],
    label: str,
    unit: int,
) -> dict[str, Any]:
    """Search; every try is a stored row, so that an interrupted search goes on where it was.

    job_of: the way's training of two steps at a length. unit: lengths are multiples of it. On a
    CPU a rank may take `memory-mib` more than it has when training begins, and freed blocks go
    back to the system, so that what is live counts; on a GPU its memory is the limit.
    """

    def attempt(length: int) -> tuple[str, float | None]:
        job = capped(job_of(length), section)
        header = f"longest, {label}, {length:,} tokens"
        row = run_job(job, store, data, {"label": label}, show, header=header)
        if row["reason"].startswith("timeout"):
            return "too slow", None
        return row["status"], row.get("step_time_s")

    try:
        found = search(
            attempt,
            start=section.start,
            unit=unit,
            most=section.most,
            precision=section.precision,
        )
    except OtherFailure as failure:
        return {"tokens": None, "at_least": False, "why": str(failure)}
    return {
        "tokens": found.tokens,
        "at_least": found.at_least,
        "why": "",
        "tries": {str(length): status for length, status in sorted(found.tries.items())},
    }


def capped(job: Job, section: LongestSection) -> Job:
    """`job` with a name of its own and, on a CPU, with its ranks' memory capped."""
    job = replace(job, name=f"longest-{job.name}", seconds=section.seconds, limit_bytes=0)
    if job.device != "cpu":
        return job
    return replace(
        job,
        script=_CAPPED,
        arguments=(str(section.memory_mib), "-", str(job.script), *job.arguments),
        environment=(*job.environment, *_BLOCKS_RETURNED),
    )
