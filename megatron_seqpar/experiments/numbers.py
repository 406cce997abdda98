# SPDX-License-Identifier: Apache-2.0
"""The numbers of a finished run that comparisons and sweeps show, from its report."""

from __future__ import annotations

import statistics
from typing import Any

UNTIMED_STEPS = 1  # the first step allocates, connects and warms caches
_KINDS = "traffic_by_kind"


def numbers(report: dict[str, Any]) -> dict[str, Any]:
    """What a run gave and cost, as plain values.

    seconds: of each timed step; `step_time_s` their median, `step_time_spread` (max - min) over it.
    Bytes are of the rank that sends most, a step, by kind of collective. Memory is in bytes, of the
    fullest rank: `peak_memory_bytes` in all, `memory_since_start_bytes` since training began.
    """
    steps, ranks, summary = report["steps"], report["ranks"], report["summary"]
    seconds = [step["seconds"] for step in steps[UNTIMED_STEPS:]]
    median = statistics.median(seconds) if seconds else None
    kinds: dict[str, float] = {}
    for rank in ranks:
        for kind, traffic in rank[_KINDS].items():
            kinds[kind] = max(kinds.get(kind, 0.0), traffic["bytes"] / max(len(steps), 1))
    sent = [sum(t["bytes"] for t in rank[_KINDS].values()) / max(len(steps), 1) for rank in ranks]
    return {
        "step_time_s": median,
        "step_time_spread": (max(seconds) - min(seconds)) / median if median else None,
        "seconds": seconds,
        "tokens_per_s": steps[-1]["tokens"] / median if median else None,
        "peak_memory_bytes": summary["peak_memory_bytes"],
        "memory_since_start_bytes": max(
            rank["peak_memory_bytes"] - rank["start_memory_bytes"] for rank in ranks
        ),
        "memory_kind": ranks[0]["memory"],
        "bytes_sent_per_step": max(sent, default=0.0),
        "bytes_by_kind": kinds,
        "losses": [step["loss"] for step in steps],
        "grad_norms": [step["grad_norm"] for step in steps],
        "peak_flops_per_rank": summary.get("peak_flops_per_rank"),
        "peak_basis": summary.get("peak_basis"),
        "peak_source": summary.get("peak_source"),
        "device": report["device"],
        "dtype": report["model"]["dtype"],
        "versions": report["versions"],
        # less where the report lies, which says nothing of the run
        "plugin": {k: v for k, v in report["plugin"].items() if k != "seqpar_report"},
    }


def largest_difference(losses: list[float | None], others: list[float | None]) -> float | None:
    """The largest relative difference between two loss curves; None where one lacks a loss.

    Raises ValueError when they have different lengths: a comparison of some steps would pass for
    one of all.
    """
    if len(losses) != len(others):
        raise ValueError(f"{len(losses)} steps against {len(others)}")
    pairs = list(zip(losses, others, strict=True))
    if not pairs or any(a is None or b is None for a, b in pairs):
        return None
    known = [(a, b) for a, b in pairs if a is not None and b is not None]
    if any(a != a or b != b for a, b in known):  # a NaN is as far off as can be
        return float("inf")
    return max(abs(a - b) / abs(b) for a, b in known)
