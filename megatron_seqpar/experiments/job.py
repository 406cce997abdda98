# SPDX-License-Identifier: Apache-2.0
"""One training run of an experiment: its command, and the key that says when it is the same."""

from __future__ import annotations

import hashlib
import importlib.metadata
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from megatron_seqpar.errors import SeqParError

PACKAGE = Path(__file__).resolve().parents[1]
SHOWS_ONLY = ("compare", "sweep", "experiments", "quickstart", "planner", "doctor", "bench")
"""Rooms that do not touch what a run gives: changing them does not call for running it again."""


@dataclass(frozen=True)
class Launch:
    """How processes are started.

    Attributes:
        prefix: words before the command: `srun ...`, or a script that runs it on several hosts.
        torchrun_args: torchrun's options, such as --nnodes and --rdzv-endpoint.
        ranks_per_node: processes that one torchrun starts; None: all of them.
    """

    prefix: tuple[str, ...] = ()
    torchrun_args: str = ""
    ranks_per_node: int | None = None


@dataclass(frozen=True)
class Job:
    """A run of the launcher.

    Attributes:
        name: for people, and part of file names.
        ranks: processes in all.
        arguments: of the script, the plugin's among them.
        script: the pretraining script.
        device: cpu or cuda.
        launch: how its processes are started.
        environment: variables over this process's own.
        limit_bytes: writable memory that a rank may take (RLIMIT_DATA, for CPU runs); 0: no limit.
        seconds: how long it may run; None: as long as it takes.
    """

    name: str
    ranks: int
    arguments: tuple[str, ...]
    script: Path
    device: str
    launch: Launch = field(default_factory=Launch)
    environment: tuple[tuple[str, str], ...] = ()
    limit_bytes: int = 0
    seconds: float | None = None

    def command(self, report: Path | str) -> list[str]:
        """The command line; the run leaves its report in `report`."""
        here = self.launch.ranks_per_node or self.ranks
        if self.ranks % here:
            raise SeqParError(
                f"launch.ranks-per-node {here}: {self.ranks} ranks cannot be shared out evenly"
            )
        words = [*self.launch.prefix, sys.executable, "-m", "megatron_seqpar", "run"]
        words += ["--nproc", str(here), "--device", self.device]
        if self.launch.torchrun_args:
            words += ["--torchrun-args", self.launch.torchrun_args]
        return [*words, str(self.script), *self.arguments, "--seqpar-report", str(report)]

    def shell(self) -> str:
        """The command as a user would type it here: without folders of this machine."""
        here = str(Path.cwd())
        words = self.command("report.json")
        words[words.index(sys.executable)] = "python"
        return shlex.join(word.replace(here + "/", "") for word in words)

    def key(self, data: str) -> str:
        """A hash of what decides the run's numbers: command, limits, versions, code and `data`."""
        digest = hashlib.sha256()
        versions = [importlib.metadata.version(name) for name in ("torch", "megatron-core")]
        limits = [str(self.limit_bytes), str(self.seconds)]
        pairs = [f"{name}={value}" for name, value in self.environment]
        words = [*self.command("report.json")[1:], *versions, *limits, *pairs, data]
        digest.update("\0".join(words).encode())
        digest.update(_code(self.script).encode())
        return digest.hexdigest()


@lru_cache(maxsize=8)
def _code(script: Path) -> str:
    """A hash of the Python files that decide what a run gives, as they are when first asked for.

    Once a process: what is edited while an experiment runs must not tell its rows apart.
    """
    digest = hashlib.sha256()
    rooms = [path for path in PACKAGE.iterdir() if path.name not in SHOWS_ONLY]
    files = [path for room in rooms if room.is_dir() for path in room.rglob("*.py")]
    files += [path for path in rooms if path.suffix == ".py"]
    for path in sorted([*files, script] if script.is_file() else files):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def environment_of(job: Job, base: Mapping[str, str]) -> dict[str, str]:
    """The variables that a job's processes get."""
    environment = {**base, **dict(job.environment)}
    if job.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""  # a lone GPU stays out of a CPU run
        environment.setdefault("OMP_NUM_THREADS", "1")  # ranks do not fight over cores
    return environment
