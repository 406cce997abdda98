# SPDX-License-Identifier: Apache-2.0
"""Train a tiny Llama-shaped model through the real launcher and read the result."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PRETRAIN = ROOT / "scripts" / "pretrain_gpt.py"
HERE = Path(__file__).parent

MODEL = shlex.split(
    "--num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 "
    "--group-query-attention --num-query-groups 2 --seq-length 96 --max-position-embeddings 512 "
    "--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear "
    "--untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0"
)
TRAINING = shlex.split(
    "--micro-batch-size 1 --global-batch-size 4 --train-iters 3 --lr 1e-3 --min-lr 1e-3 "
    "--lr-decay-style constant --mock-data --tokenizer-type NullTokenizer --vocab-size 255 "
    "--eval-iters 0 --eval-interval 1000 --log-interval 1 --split 99,1,0"
)


@dataclass(frozen=True)
class Run:
    """A finished run: exit status, all it printed, and its printed loss by iteration."""

    status: int
    text: str

    @property
    def losses(self) -> dict[int, float]:
        """Iteration -> printed loss. Megatron prints the mean of the first two as the second."""
        found = re.findall(r"iteration +(\d+)/.*?lm loss: ([0-9.E+-]+)", self.text)
        return {int(iteration): float(loss) for iteration, loss in found}


def launch(
    processes: int,
    *arguments: str,
    script: Path = PRETRAIN,
    dump: Path | None = None,
    mask: float | None = None,
    plugin: bool = True,
    model: tuple[str, ...] | list[str] = MODEL,
    timeout: float = 240.0,
) -> Run:
    """Run `script` on `processes` ranks on the CPU and wait.

    dump: write the parameter gradients of the first step there (`dump_gradients.compare`).
    mask: this fraction of every sequence does not count in the loss.
    """
    chain = [str(script)]
    if dump is not None:
        chain = [str(HERE / "dump_gradients.py"), str(dump), *chain]
    if mask is not None:
        chain = [str(HERE / "mask_tokens.py"), str(mask), *chain]
    command = [sys.executable, "-m", "megatron_seqpar", "run", "--nproc", str(processes)]
    command += ["--device", "cpu"] + ([] if plugin else ["--no-plugin"])
    path = os.pathsep.join([str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [*command, *chain, *model, *TRAINING, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment,
        check=False,
    )
    return Run(done.returncode, done.stdout + done.stderr)


def trained(run: Run) -> Run:
    """The run, after checking that it ended well."""
    assert run.status == 0, run.text[-3000:]
    assert run.losses, run.text[-3000:]
    return run
