# SPDX-License-Identifier: Apache-2.0
"""Published times of DISTFLASHATTN (arXiv 2310.03294) that its simulation is fitted to.

Seconds of an iteration, forward and backward, batch 1, on DGX A100 80 GB nodes joined by 100 Gb/s
InfiniBand. Lengths in thousands (1,024) of tokens of the whole sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Method(StrEnum):
    """How a sequence is split, and what is computed again in backward."""

    MEGATRON = "Megatron TP"  # heads over ranks, all recomputed
    DISTFLASHATTN = "DISTFLASHATTN"  # its schedule, recomputation from attention outputs
    FULL = "DISTFLASHATTN, full recomputation"  # its schedule, layers recomputed whole
    ULYSSES = "Ulysses"  # heads for tokens, layers recomputed whole
    OURS = "balanced, attention-output"  # of this project


@dataclass(frozen=True)
class Cell:
    """One measurement: `model` is a file of configs/models."""

    model: str
    ranks: int
    thousands: int
    method: Method
    seconds: float


_SEVEN, _GROUPED = "llama2-7b", "llama2-7b-gqa"
_PAIRS = (
    (_SEVEN, 64, 6.81, 5.98),
    (_GROUPED, 64, 6.60, 5.61),
    (_SEVEN, 128, 20.93, 17.26),
    (_GROUPED, 128, 20.53, 16.86),
    (_SEVEN, 256, 72.75, 58.46),
    (_GROUPED, 256, 71.93, 57.01),
)
ANCHORS: tuple[Cell, ...] = (
    *(Cell(model, 8, length, Method.MEGATRON, megatron) for model, length, megatron, _ in _PAIRS),
    *(Cell(model, 8, length, Method.DISTFLASHATTN, ours) for model, length, _, ours in _PAIRS),
    Cell(_SEVEN, 8, 64, Method.FULL, 6.93),
    Cell(_SEVEN, 8, 128, Method.FULL, 21.44),
    Cell(_SEVEN, 8, 256, Method.FULL, 76.38),
    Cell(_SEVEN, 16, 256, Method.ULYSSES, 37.53),
    Cell(_SEVEN, 16, 512, Method.ULYSSES, 134.09),
)
