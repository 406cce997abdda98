# SPDX-License-Identifier: Apache-2.0
"""What the runs of an experiment share: model, data, batch and optimizer, as Megatron's flags."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_seqpar.data import VOCABULARY_SIZE, Corpus, tokenizer_arguments
from megatron_seqpar.mfu import Model, model_from_flags, read_flags


@dataclass(frozen=True)
class Training:
    """What all runs share.

    Attributes:
        model: file of the model's flags; `changes` are laid over it (None takes a flag away).
        batch: sequences of a step, over all ranks.
        extra: more of Megatron's flags, over those made here.
    """

    model: Path
    corpus: Corpus
    cache: Path
    steps: int
    sequence_length: int
    batch: int
    seed: int = 1234
    micro_batch: int = 1
    changes: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    def model_flags(self) -> dict[str, Any]:
        """The model's flags, changes included; the corpus' vocabulary where they name none."""
        return {"vocab-size": VOCABULARY_SIZE, **read_flags(self.model), **self.changes}

    def sizes(self) -> Model:
        """The model's sizes. Raises SeqParError as `model_from_flags`."""
        return model_from_flags(self.model_flags(), str(self.model))

    def arguments(self) -> list[str]:
        """Megatron's arguments of model, data, batch and optimizer.

        Weights are initialised on the CPU so that tensor parallelism starts from the same ones,
        and the loss is a mean over tokens, so that all runs compute the same quantity.
        """
        pairs: dict[str, Any] = {
            "seq-length": self.sequence_length,
            "max-position-embeddings": self.sequence_length,
            "micro-batch-size": self.micro_batch,
            "global-batch-size": self.batch,
            "train-iters": self.steps,
            "lr": 2e-3,
            "min-lr": 2e-4,
            "lr-decay-style": "cosine",
            "lr-warmup-iters": min(3, self.steps - 1),
            "weight-decay": 0.1,
            "adam-beta2": 0.95,
            "clip-grad": 1.0,
            "seed": self.seed,
            "use-cpu-initialization": True,
            "calculate-per-token-loss": True,
            "no-create-attention-mask-in-dataloader": True,
            "data-path": self.corpus.data_path,
            "data-cache-path": str(self.cache),
            "split": "100,0,0",
            "num-workers": 0,
            "eval-iters": 0,
            "eval-interval": 1000000,
            "log-interval": 1,
            **self.extra,
        }
        return [*tokenizer_arguments(), *flags(self.model_flags()), *flags(pairs)]


def model_arguments(path: Path) -> list[str]:
    """A model file as Megatron's arguments. SeqParError for anything but a flat mapping."""
    return flags(read_flags(path))


def flags(values: Mapping[str, Any]) -> list[str]:
    """`{"num-layers": 2, "swiglu": True}` as arguments; a false switch is left out."""
    arguments = []
    for name, value in values.items():
        if value is True:
            arguments.append(f"--{name}")
        elif value is not False and value is not None:
            arguments += [f"--{name}", str(value)]
    return arguments
