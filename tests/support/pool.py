# SPDX-License-Identifier: Apache-2.0
"""A pool of worker processes joined in one gloo process group, kept for many tests.

`pool.run(function, ...)` calls a module-level function on every worker and returns the results in
rank order. A failure on a rank raises `WorkerError` with that rank's traceback; a rank that says
nothing in time raises with what it wrote to stderr. After either the pool is dead.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

START_SECONDS = 240.0
"""Until all workers have started."""


class WorkerError(AssertionError):
    """A worker failed or fell silent."""


class KnownGroups:
    """`new_group`, but the same ranks get the same group again: each keeps its threads for ever.

    Models built one after the other in a worker, each with Megatron's dozens of groups, would
    otherwise leave thousands of threads behind.
    """

    def __init__(self, new_group: Callable[..., Any]) -> None:
        self.new_group = new_group
        self.known: dict[Any, Any] = {}

    def __call__(self, ranks: Any = None, **options: Any) -> Any:
        key = tuple(ranks or ()), options.get("backend"), options.get("group_desc")
        if key not in self.known:
            self.known[key] = self.new_group(ranks, **options)
        return self.known[key]


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _work(rank: int, size: int, port: int, pipe: Connection, stderr: str) -> None:
    descriptor = os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 2)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    pipe.send(None)  # up: importing torch may take long on a busy machine
    while (order := pipe.recv()) is not None:
        function, args = order
        try:
            if not dist.is_initialized():  # all are up, so nobody waits for a process to start
                patience = timedelta(seconds=60)
                dist.init_process_group("gloo", rank=rank, world_size=size, timeout=patience)
                dist.new_group = KnownGroups(dist.new_group)
            pipe.send((True, function(rank, *args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
    if dist.is_initialized():
        dist.destroy_process_group()


class GlooPool:
    """`size` processes, one gloo world."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.folder = tempfile.TemporaryDirectory()
        context, port = mp.get_context("spawn"), _free_port()
        self.pipes, self.processes = [], []
        self.up = False
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work, args=(rank, size, port, theirs, self._stderr(rank)), daemon=True
            )
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def _stderr(self, rank: int) -> str:
        return str(Path(self.folder.name) / f"stderr{rank}")

    @property
    def alive(self) -> bool:
        """Whether every worker still runs."""
        return all(process.is_alive() for process in self.processes)

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
        """`function(rank, *args)` on every worker; results in rank order."""
        if not self.up:
            self._answers(START_SECONDS)
            self.up = True
        for pipe in self.pipes:
            pipe.send((function, args))
        results = []
        for rank, (good, result) in enumerate(self._answers(timeout)):
            if not good:
                self.stop()
                raise WorkerError(f"rank {rank} failed:\n{result}")
            results.append(result)
        return results

    def _answers(self, timeout: float) -> list[Any]:
        """What every worker says next, in rank order."""
        deadline, answers = time.monotonic() + timeout, []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(max(0.0, deadline - time.monotonic())):
                tail = Path(self._stderr(rank)).read_text()[-2000:]
                self.stop()
                raise WorkerError(f"rank {rank} said nothing for {timeout} s; its stderr: {tail}")
            answers.append(pipe.recv())
        return answers

    def stop(self) -> None:
        """End the workers."""
        for process in self.processes:
            process.kill()
            process.join()
