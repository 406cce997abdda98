# SPDX-License-Identifier: Apache-2.0
"""Short trainings through the launcher, for tests: a tiny Llama-shaped GPT on made-up data."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "scripts" / "pretrain_gpt.py"
TINY = shlex.split(
    """
    --num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 64
    --max-position-embeddings 64 --micro-batch-size 2 --global-batch-size 4
    --train-iters 4 --lr 1e-3 --lr-decay-iters 10 --min-lr 1e-4 --weight-decay 0.01
    --mock-data --tokenizer-type NullTokenizer --vocab-size 127 --split 90,5,5 --seed 7
    --log-interval 1 --eval-iters 0 --eval-interval 100 --attention-dropout 0 --hidden-dropout 0
    --normalization RMSNorm --swiglu --group-query-attention --num-query-groups 2
    --position-embedding-type rope --disable-bias-linear --untie-embeddings-and-output-weights
    """
)
LOSS = re.compile(r"iteration +(\d+)/.*?lm loss: ([0-9.E+-]+) ")


@dataclass(frozen=True)
class Run:
    """A finished run of the launcher."""

    status: int
    stdout: str
    stderr: str

    @property
    def losses(self) -> dict[int, float]:
        """Loss by iteration. The second of a run is the mean of its first two in Megatron's log."""
        return {int(step): float(loss) for step, loss in LOSS.findall(self.stdout)}

    @property
    def error_lines(self) -> list[str]:
        """What the launcher itself wrote to stderr."""
        ours = ("[rank ", "    (", "megatron-seqpar:")
        return [line for line in self.stderr.splitlines() if line.startswith(ours)]


def run_launcher(*arguments: str, seconds: float = 240, **environment: str) -> Run:
    """`megatron-seqpar run ARGUMENTS` without a plugin, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "megatron_seqpar", "run", "--no-plugin", *arguments],
        capture_output=True,
        text=True,
        timeout=seconds,
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment},
    )
    return Run(done.returncode, done.stdout, done.stderr)


def train(processes: int, *arguments: str, script: Path = SCRIPT) -> Run:
    """Train the tiny model with `arguments` added; AssertionError where it fails."""
    run = run_launcher(f"--nproc={processes}", str(script), *TINY, *arguments)
    assert run.status == 0, run.stderr[-3000:]
    return run
