# SPDX-License-Identifier: Apache-2.0
"""From the options of the training benchmarks to what is run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ..data import Corpus
from ..errors import SeqParError, UnsupportedError
from ..experiments.corpus import STDLIB, corpus_of
from ..experiments.machine import FUSED_KERNELS, Machine
from ..experiments.store import Store
from ..experiments.training import Training
from ..launcher.environment import under_torchrun
from ..mfu import read_flags
from ..shipped import model_file, pretraining_script
from . import result
from .place import default_ranks, device_of
from .ranks import say
from .training import Trainer

_MODELS = {"cpu": "benchmark", "cuda": "llama3-8b"}


@dataclass(frozen=True)
class Prepared:
    """What a training benchmark works with.

    Attributes:
        trainer: how runs are started.
        model: the model's file.
        corpus: what is trained on.
        kernel: of all ways but stock ones.
        limit_gib: see `training.left_out`.
        about: what the result says of command, versions and hardware.
        held: the folder's lock, for as long as this is referred to: two commands in one folder
            would read each other's reports, and slow each other down.
    """

    trainer: Trainer
    model: Path
    corpus: Corpus
    kernel: str
    limit_gib: float
    about: dict[str, Any]
    held: ExitStack

    def training(self, length: int, steps: int, changes: dict[str, Any]) -> Training:
        """One sequence of `length` tokens a step.

        On GPUs weights are made there: on the CPU a large model takes minutes, and only losses of
        tensor parallelism need it.
        """
        on_gpu = self.trainer.machine.device == "cuda"
        extra = {"use-cpu-initialization": False} if on_gpu else {}
        cache = self.trainer.folder / "cache"
        return Training(
            self.model, self.corpus, cache, steps, length, batch=1, changes=changes, extra=extra
        )

    def result(self, benchmark: str, **settings: Any) -> dict[str, Any]:
        """The result without its rows."""
        return {
            "benchmark": benchmark,
            **self.about,
            "device": self.trainer.machine.device,
            "device_name": self.trainer.machine.name,
            "model": {"name": self.model.stem, "flags": read_flags(self.model)},
            "settings": {"kernel": self.kernel, **settings},
        }


def ranks_and_device(device: str, ranks: Sequence[int] | None) -> tuple[tuple[int, ...], str]:
    """Numbers of ranks, and the one device that serves them all."""
    if under_torchrun():
        raise UnsupportedError(
            "torchrun started this process, but this benchmark starts its runs itself; run it "
            "without torchrun"
        )
    counts = tuple(ranks or (default_ranks(device),))
    return counts, device_of(device, max(counts))


def prepare(
    device: str,
    model: str | None,
    script: Path | None,
    data: str,
    work: Path,
    kernel: str | None,
    stock_limit_gib: float | None,
    seconds: float | None,
    console: Console,
) -> Prepared:
    """Find model and script, wait for the folder, build the corpus, describe the machine.

    Raises SeqParError where a file is missing.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread a rank; inherited by the runs
    file = model_file(model or _MODELS[device])
    read_flags(file)
    script = script or pretraining_script()
    if not script.is_file():
        raise SeqParError(f"--script {script}: no such file")
    if data != STDLIB and not Path(data).is_file():
        raise SeqParError(f"--data {data}: no such file; give stdlib or a JSON-lines file")
    held = ExitStack()
    held.enter_context(Store(work).turn(say))
    about = result.describe()
    memory = result.gpu_memory_bytes(about) if device == "cuda" else None
    limit = about["memory_gib"] / 2 if memory is None else memory / 2**30
    name = f"CPU, {about['cores']} cores" if device == "cpu" else _gpu_name(about)
    return Prepared(
        trainer=Trainer(Machine(device, name, 1), script, work, seconds=seconds),
        model=file,
        corpus=corpus_of(data, work / "data", console),
        kernel=kernel or FUSED_KERNELS[device],
        limit_gib=limit if stock_limit_gib is None else stock_limit_gib,
        about=about,
        held=held,
    )


def _gpu_name(about: dict[str, Any]) -> str:
    return about["gpus"][0]["name"] if "gpus" in about else "GPU"
