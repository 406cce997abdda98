# SPDX-License-Identifier: Apache-2.0
"""Run a pretraining script with its memory limited or accounted for, on every rank.

    megatron-seqpar run --nproc N .../bench/memory_rank.py CAP_MIB ACCOUNT.json SCRIPT ARGS

The launcher runs this file by its path, inside training; nothing imports it.

CAP_MIB: when training starts, a rank may take that much more writable memory than it has then
    (RLIMIT_DATA); 0 for no limit. An allocation beyond it fails as one on a full GPU does.
ACCOUNT.json: '-' for none. Else torch's own account of the second step: the most bytes that its
    CPU allocator had handed out beyond those at the step's start, by rank.
"""

from __future__ import annotations

import json
import resource
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_seqpar.integration import steps

ACCOUNTED_STEP = 2  # the first one allocates the optimizer's state


def writable_bytes() -> int:
    """Private writable memory of this process, as RLIMIT_DATA counts it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmData in /proc/self/status")


def limit(mib: int) -> None:
    """Let this process take `mib` MiB more when Megatron's `train` begins."""

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def train(*args: Any, **kwargs: Any) -> Any:
            most = writable_bytes() + mib * 2**20
            resource.setrlimit(resource.RLIMIT_DATA, (most, most))
            return original(*args, **kwargs)

        return train

    steps.around("train", wrap)


def largest(changes: list[tuple[int, int]]) -> int:
    """The highest sum over time of (time, bytes taken or given back)."""
    total = peak = 0
    for _, change in sorted(changes):
        total += change
        peak = max(peak, total)
    return peak


def account(path: Path) -> None:
    """Write the peak of torch's CPU allocator in one step to `path`, with this rank in its name."""
    done = 0

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def train_step(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            done += 1
            if done != ACCOUNTED_STEP:
                return original(*args, **kwargs)
            with torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
            ) as profiler:
                result = original(*args, **kwargs)
            events = profiler.profiler.kineto_results.events()
            changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
            if not changes:
                raise RuntimeError("the profiler saw no allocation")
            rank = torch.distributed.get_rank()
            path.with_suffix(f".{rank}.json").write_text(
                json.dumps({"rank": rank, "peak_bytes": largest(changes)})
            )
            return result

        return train_step

    steps.around("train_step", wrap)


def main() -> None:
    cap, target, script, *rest = sys.argv[1:]
    if int(cap):
        limit(int(cap))
    if target != "-":
        account(Path(target))
    sys.argv = [script, *rest]
    sys.path[0] = str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
