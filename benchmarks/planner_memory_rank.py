# SPDX-License-Identifier: Apache-2.0
"""Run a pretraining script and account for every byte that torch's CPU allocator hands out.

    megatron-seqpar run --nproc N benchmarks/planner_memory_rank.py ACCOUNT.json SCRIPT ARGS

The account begins before the model is built, so what a rank holds is all in it: weights, gradients,
optimizer state, data, activations. Written for each rank are the bytes held when the second step
begins, when the optimizer's state is there, and the most that are held within that step.
"""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_seqpar.integration import steps

STEP = 2
MARK = "planner_memory_step"


@dataclass(frozen=True)
class Change:
    """An allocation (size > 0), or its end, at an address."""

    time: int
    address: int
    size: int


def changes_of(tree: list[Any]) -> list[Change]:
    """All that the profiler saw, in order of time."""
    found = []
    waiting = list(tree)
    while waiting:
        node = waiting.pop()
        waiting += node.children
        if node.tag.name == "Allocation":
            fields = node.extra_fields
            found.append(Change(node.start_time_ns, fields.ptr, fields.alloc_size))
    return sorted(found, key=lambda change: change.time)


def held(changes: list[Change], start: int, end: int) -> dict[str, int]:
    """Bytes at the beginning of a step and the most within it.

    What gloo's threads give back, copies of what was sent, the profiler does not see: an address
    that is handed out again was free.
    """
    live: dict[int, int] = {}
    total = before = most = 0
    for change in changes:
        total -= live.pop(change.address, 0)
        if change.size > 0:
            live[change.address] = change.size
            total += change.size
        if change.time < start:
            before = most = total
        elif change.time <= end:
            most = max(most, total)
    return {"before": before, "most": most}


def around_step(original: Callable[..., Any]) -> Callable[..., Any]:
    """`train_step`, the `STEP`th one under a mark; the account ends with it."""

    def train_step(*args: Any, **kwargs: Any) -> Any:
        global done
        done += 1
        if done != STEP:
            return original(*args, **kwargs)
        with torch.profiler.record_function(MARK):
            result = original(*args, **kwargs)
        profiler.__exit__(None, None, None)
        results = profiler.profiler.kineto_results
        [mark] = [event for event in results.events() if event.name() == MARK]
        start = mark.start_ns()
        changes = changes_of(results.experimental_event_tree())
        found = held(changes, start, start + mark.duration_ns())
        rank = torch.distributed.get_rank()
        Path(f"{account}.{rank}").write_text(json.dumps({"rank": rank, **found}))
        return result

    return train_step


if __name__ == "__main__":
    account, script, *rest = sys.argv[1:]
    done = 0
    profiler = torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU],
        profile_memory=True,
    )
    steps.around("train_step", around_step)
    profiler.__enter__()
    sys.argv = [script, *rest]
    sys.path[0] = str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")
