# SPDX-License-Identifier: Apache-2.0
"""Train a small Llama-shaped model on the real corpus through the launcher and read its report."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_seqpar.data import VOCABULARY_SIZE, Corpus, tokenizer_arguments
from tests.support.releases import at_least

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / "tests" / "integration"

MODEL = shlex.split(
    "--num-layers 2 --hidden-size 64 --ffn-hidden-size 160 --num-attention-heads 4 "
    "--group-query-attention --num-query-groups 2 --position-embedding-type rope "
    "--normalization RMSNorm --swiglu --disable-bias-linear --untie-embeddings-and-output-weights "
    "--attention-dropout 0 --hidden-dropout 0 --use-cpu-initialization"
)
TRAINING = shlex.split(
    "--micro-batch-size 1 --global-batch-size 2 --lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine "
    "--lr-warmup-iters 5 --weight-decay 0.1 --clip-grad 1.0 --seed 1234 --eval-iters 0 "
    "--eval-interval 1000 --log-interval 1 --split 100,0,0 --num-workers 0"
)


def tokenizer() -> list[str]:
    """Arguments of the corpus' tokenizer.

    Before 0.18 none names the token that ends documents, which comes on top of the vocabulary.
    """
    given = tokenizer_arguments()
    if not at_least("0.18") and "--null-tokenizer-eod-id" in given:
        at = given.index("--null-tokenizer-eod-id")
        del given[at : at + 2]
        given[given.index("--vocab-size") + 1] = str(VOCABULARY_SIZE - 1)
    return given


@dataclass(frozen=True)
class Trained:
    """A finished run: exact loss and gradient norm of each step, and the first step's gradients."""

    losses: list[float]
    grad_norms: list[float]
    gradients: dict[str, torch.Tensor]
    report: dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """What runs that are compared have in common.

    dense_masks: the data loader makes masks where the run has a use for them.
    script: what is run, behind scripts that change something first and then run the next.
    """

    corpus: Corpus
    cache: Path
    folder: Path
    steps: int = 50
    seq_length: int = 384
    mask: float | None = None
    dense_masks: bool = False
    extra: tuple[str, ...] = ()
    model: tuple[str, ...] = tuple(MODEL)
    script: tuple[Path, ...] = (ROOT / "scripts" / "pretrain_gpt.py",)

    def train(
        self,
        name: str,
        ranks: int,
        *arguments: str,
        plain: dict[str, Any] | None = None,
        timeout: float = 280.0,
    ) -> Trained:
        """Run to the end; AssertionError with the end of the output if it fails.

        plain: train with textbook attention in the place of Megatron's, with these options.
        """
        folder = self.folder / name
        folder.mkdir(parents=True)
        gradients, report = folder / "gradients.pt", folder / "report.json"
        chain = [str(TOOLS / "dump_gradients.py"), str(gradients)]
        chain += [str(path) for path in self.script]
        if self.mask is not None:
            chain = [str(TOOLS / "mask_tokens.py"), str(self.mask), *chain]
        if plain is not None:
            chain = [str(TOOLS / "plain_attention.py"), json.dumps(plain), *chain]
        length = str(self.seq_length)
        command = [sys.executable, "-m", "megatron_seqpar", "run", "--nproc", str(ranks)]
        command += ["--device", "cpu", *chain, *self.model, *TRAINING, *tokenizer()]
        command += ["--seq-length", length, "--max-position-embeddings", length]
        if not self.dense_masks:
            command += ["--no-create-attention-mask-in-dataloader"]
        command += ["--train-iters", str(self.steps), "--data-path", self.corpus.data_path]
        command += ["--data-cache-path", str(self.cache), "--seqpar-report", str(report)]
        path = os.pathsep.join([str(ROOT), str(TOOLS), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            [*command, *self.extra, *arguments],
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
            check=False,
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        content = json.loads(report.read_text())
        losses = [step["loss"] for step in content["steps"]]
        norms = [step["grad_norm"] for step in content["steps"]]
        assert len(losses) == self.steps
        return Trained(losses, norms, torch.load(gradients), content)
