# SPDX-License-Identifier: Apache-2.0
"""Ranks as processes of this machine, or those that torchrun started: run, and hand back rows.

Rank 0 gives rows to `Emit` as it measures them. They go through a file, so that what was measured
before a rank failed is not lost with it.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..errors import SeqParError
from ..launcher.environment import free_port
from .place import Place

Row = dict[str, Any]
Emit = Callable[[Row], None]
Kind = Literal["refused", "oom", "error"]


@dataclass
class Gathered:
    """What ranks measured: rows until the end, or until one failed and why."""

    rows: list[Row] = field(default_factory=list)
    failure: Kind | None = None
    text: str = ""

    def checked(self) -> list[Row]:
        """The rows; SeqParError where a rank failed."""
        if self.failure is not None:
            raise SeqParError(self.text)
        return self.rows


def on_ranks(work: Callable[..., None], place: Place, *arguments: Any) -> Gathered:
    """Run `work(device, emit, *arguments)` on every rank of a place and wait.

    work: a function of a module; it finds torch.distributed initialised, and calls `emit` on rank 0
        alone. `device` is torch's. Under torchrun this process is a rank, and rank 0 has the rows.
    """
    if place.started:
        return _as_rank(work, place, arguments)
    from torch.multiprocessing.spawn import ProcessExitedException, spawn

    if place.device == "cpu":
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # inherited; one thread a rank
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spawned = spawn(
            _rank, args=(place, free_port(), folder, work, arguments), nprocs=place.ranks,
            join=False,
        )  # fmt: skip
        gathered = Gathered()
        try:
            while not spawned.join():
                continue
        except ProcessExitedException as failure:
            killed = failure.signal_name == "SIGKILL"
            gathered.failure = "oom" if killed else "error"
            gathered.text = f"rank {failure.error_index}: {failure}"
            if killed:
                gathered.text += " (the system kills a process that takes too much memory)"
        _read_failures(folder, gathered)
        rows = folder / "rows"
        if rows.is_file():
            gathered.rows = [json.loads(line) for line in rows.read_text().splitlines()]
        return gathered


def say(text: str) -> None:
    """A line of progress, beside what the command prints as its result."""
    print(text, file=sys.stderr, flush=True)


def _rank(
    rank: int,
    place: Place,
    port: int,
    folder: Path,
    work: Callable[..., None],
    arguments: tuple[Any, ...],
) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(place.ranks), LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    with (folder / "rows").open("a", encoding="utf-8") as rows:

        def emit(row: Row) -> None:
            rows.write(json.dumps(row) + "\n")
            rows.flush()

        try:
            _joined(work, place, emit, arguments)
        except Exception as failure:
            kind = _kind(failure)
            text = str(failure)
            if kind == "oom":
                text = f"rank {rank}: {text.splitlines()[0] if text else 'out of memory'}"
            elif kind == "error":
                text = f"rank {rank} failed:\n{traceback.format_exc()}"
            (folder / f"failure.{rank}").write_text(json.dumps({"kind": kind, "text": text}))
            sys.exit(1)


def _as_rank(work: Callable[..., None], place: Place, arguments: tuple[Any, ...]) -> Gathered:
    gathered = Gathered()
    _joined(work, place, gathered.rows.append, arguments)
    return gathered


def _joined(
    work: Callable[..., None], place: Place, emit: Emit, arguments: tuple[Any, ...]
) -> None:
    import torch
    import torch.distributed as dist

    device = torch.device("cpu")
    if place.device == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group(place.backend)
    work(device, emit, *arguments)
    dist.barrier()  # nobody leaves while another still listens
    dist.destroy_process_group()


def _kind(failure: Exception) -> Kind:
    from .watch import ran_out_of_memory

    if isinstance(failure, SeqParError):
        return "refused"
    return "oom" if ran_out_of_memory(failure) else "error"


def _read_failures(folder: Path, gathered: Gathered) -> None:
    """What the ranks said; one that ran out of memory explains why others lost their peer."""
    said = [json.loads(path.read_text()) for path in sorted(folder.glob("failure.*"))]
    for kind in ("oom", "refused", "error"):
        for entry in said:
            if entry["kind"] == kind:
                gathered.failure, gathered.text = entry["kind"], entry["text"]
                return
