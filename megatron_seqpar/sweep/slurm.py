# SPDX-License-Identifier: Apache-2.0
"""Rows of a sweep as SLURM jobs: a batch script a row, submitted with `sbatch --wait`.

Each node runs one task, which is torchrun for the node's ranks; they meet at the first node. The
sweep waits for a row before it submits the next, so that runs never share a node's links and a
killed sweep leaves at most one job, which is cancelled when it is interrupted.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from megatron_seqpar.errors import SeqParError
from megatron_seqpar.experiments.execute import STEP_PREFIX, Outcome, outcome_of
from megatron_seqpar.experiments.job import Job, Launch
from megatron_seqpar.sweep.space import Slurm

_RENDEZVOUS = (
    "--nnodes $SLURM_JOB_NUM_NODES --node-rank $SLURM_NODEID "
    "--master-addr $SEQPAR_MASTER --master-port $SEQPAR_PORT"
)


def check_slurm() -> None:
    """Raise SeqParError where there is no sbatch."""
    if shutil.which("sbatch") is None:
        raise SeqParError(
            "executor: sbatch: no sbatch on PATH; run the sweep on a login node, or use "
            "executor: local"
        )


def batch_script(job: Job, slurm: Slurm, folder: Path) -> str:
    """The text of a job's batch script."""
    each = min(slurm.ranks_per_node, job.ranks)
    nodes, rest = divmod(job.ranks, each)
    if rest:
        raise SeqParError(
            f"slurm.ranks-per-node {slurm.ranks_per_node}: {job.ranks} ranks cannot be shared out "
            "evenly over nodes"
        )
    multi = nodes > 1
    inner = replace(
        job, launch=Launch(torchrun_args=_RENDEZVOUS if multi else "", ranks_per_node=each)
    )
    words = [shlex.quote(word) for word in inner.command((folder / "report.json").absolute())]
    command = " ".join(words)
    lines = [
        "#!/bin/bash",
        f"#SBATCH --job-name=seqpar-{job.name[:40]}",
        f"#SBATCH --nodes={nodes}",
        "#SBATCH --ntasks-per-node=1",
        f"#SBATCH --output={(folder / 'log.txt').absolute()}",
        *(f"#SBATCH {directive}" for directive in slurm.directives),
        "set -euo pipefail",
        *(f"export {name}={shlex.quote(value)}" for name, value in job.environment),
        *slurm.setup,
    ]
    if multi:  # the task's own node number is known only where the task runs
        lines += [
            # no pipe: one whose reader leaves early fails under pipefail
            'SEQPAR_MASTER="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"',
            "SEQPAR_MASTER=\"${SEQPAR_MASTER%%$'\\n'*}\"",
            'SEQPAR_PORT="$((20000 + SLURM_JOB_ID % 20000))"',
            "export SEQPAR_MASTER SEQPAR_PORT",
        ]
        command = command.replace(shlex.quote(_RENDEZVOUS), f'"{_RENDEZVOUS}"')
        command = f"bash -c {shlex.quote(command)}"
    lines.append(f"{shlex.join(slurm.srun)} {command}")
    return "\n".join(lines) + "\n"


def submit(slurm: Slurm) -> Callable[[Job, Path, Callable[[str], None]], Outcome]:
    """A runner of jobs, as `execute` is, that submits them."""

    def run(job: Job, folder: Path, show: Callable[[str], None]) -> Outcome:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in ("report.json", "log.txt"):
            (folder / stale).unlink(missing_ok=True)
        script = folder / "job.sh"
        script.write_text(batch_script(job, slurm, folder), encoding="utf-8")
        limit = [] if job.seconds is None else [f"--time={max(1, int(job.seconds // 60) + 1)}"]
        with subprocess.Popen(
            ["sbatch", "--wait", "--parsable", *limit, str(script)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            number = process.stdout.readline().split(";")[0].strip()
            show(f"    submitted as job {number}" if number else "    not submitted")
            try:
                _, said = process.communicate()
            except BaseException:
                if re.fullmatch(r"\d+", number):
                    subprocess.run(["scancel", number], check=False)
                process.terminate()
                raise
        log = folder / "log.txt"
        lines = (
            log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
        )
        seen = sum(STEP_PREFIX in line for line in lines)
        return outcome_of(
            process.returncode, folder / "report.json", [*lines, *said.splitlines()], seen
        )

    return run
