# SPDX-License-Identifier: Apache-2.0
"""How many pieces MLPs and the loss are computed in: as few as it takes for a step to fit.

Pieces of an MLP cost nothing where backward repeats it anyway, and a forward of it where it would
not. Pieces of the loss cost one more product of hidden states and head in backward. Both make
matrices smaller. So `choose` takes none where all fits, else what costs least of what fits, with
as few pieces as that needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from megatron_seqpar.memory.sizes import Activations

GIB = 2**30
ROOM_LEFT = 0.1
"""Part of the budget left for what the formulas do not count: fragments, work spaces, libraries."""


@dataclass(frozen=True)
class Choice:
    """Pieces for MLPs and for the loss, 0 for off, and why in words."""

    mlp: int
    loss: int
    why: str
    fits: bool = True


def choose(
    sizes: Activations,
    recompute: str,
    *,
    fixed_bytes: int,
    budget_bytes: int,
    least_tokens: int,
    mlp: int | None = None,
    loss: int | None = None,
) -> Choice:
    """The cheapest pieces with which a training step stays within its budget.

    fixed_bytes: parameters, gradients and optimizer state of this rank. budget_bytes: its memory.
    least_tokens: rows below which a piece's matrix products lose speed; no piece gets fewer.
    mlp, loss: numbers that are given; None where the choice is free.
    """
    most = max(1, sizes.tokens // max(1, least_tokens))
    room = budget_bytes * (1 - ROOM_LEFT) - fixed_bytes

    def fits(mlp_chunks: int, loss_chunks: int) -> bool:
        return sizes.peak(recompute, mlp_chunks, loss_chunks) <= room

    free_mlp, free_loss = mlp is None, loss is None
    settled = (mlp or 0, loss or 0)
    if fits(*settled):
        return Choice(*settled, _why(sizes, recompute, settled, fixed_bytes, budget_bytes))
    mlp_repeats = recompute != "none"
    # cheapest first: pieces of what backward repeats anyway, then of the loss, then both
    attempts = [(free_mlp, False), (False, free_loss), (free_mlp, free_loss)]
    if not mlp_repeats:
        attempts[:2] = attempts[1::-1]
    for split_mlp, split_loss in attempts:
        pieces = _fewest(fits, settled, (split_mlp, split_loss), most)
        if pieces is not None:
            return Choice(*pieces, _why(sizes, recompute, pieces, fixed_bytes, budget_bytes))
    pieces = (most if free_mlp else settled[0], most if free_loss else settled[1])
    why = _why(sizes, recompute, pieces, fixed_bytes, budget_bytes)
    return Choice(*pieces, why, fits=False)


def _fewest(
    fits: Callable[[int, int], bool],
    settled: tuple[int, int],
    split: tuple[bool, bool],
    most: int,
) -> tuple[int, int] | None:
    """The fewest pieces, a power of two or `most`, that fit when the marked ones are cut."""
    if not any(split):
        return None
    counts = [2**power for power in range(1, math.ceil(math.log2(most)))] if most > 2 else []
    for count in [*counts, most]:
        mlp, loss = (count if cut else given for cut, given in zip(split, settled, strict=True))
        if fits(mlp, loss):
            return mlp, loss
    return None


def _why(
    sizes: Activations, recompute: str, pieces: tuple[int, int], fixed: int, budget: int
) -> str:
    mlp, loss = pieces
    kept = sizes.layers * sizes.kept_per_layer(recompute, mlp)
    whole = sizes.peak(recompute)
    text = (
        f"model state {fixed / GIB:.3g} GiB + kept activations {kept / GIB:.3g} GiB + "
        f"{(sizes.peak(recompute, mlp, loss) - kept) / GIB:.3g} GiB at the fullest moment, of "
        f"{budget / GIB:.3g} GiB"
    )
    if pieces != (0, 0):
        text += f"; {(fixed + whole) / GIB:.3g} GiB in one piece"
    return text
