# SPDX-License-Identifier: Apache-2.0
"""How many layers of a large model fit into the memory at hand, found by training.

One layer and two are trained: memory grows by the same amount with each layer, so their peaks say
how many should fit. That many are trained, and fewer where they do not fit after all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ..errors import SeqParError

SHARE = 0.92
"""Of the memory: the rest goes to the context, to NCCL and to what the allocator cannot use."""

Attempt = Callable[[int], tuple[str, int | None]]


@dataclass
class Fitting:
    """Layers that trained, and all tries: layers -> status and peak bytes."""

    layers: int = 0
    tries: dict[int, tuple[str, int | None]] = field(default_factory=dict)


def layers_that_fit(attempt: Attempt, most: int, limit_bytes: int) -> Fitting:
    """Search; `attempt(layers)` trains and gives a status ('ok', 'oom', other) and the peak bytes.

    most: layers of the whole model. limit_bytes: memory of a rank.

    Raises SeqParError where not one layer fits, and for a failure that is not about memory.
    """
    found = Fitting()

    def peak_of(layers: int) -> int | None:
        status, peak = attempt(layers)
        found.tries[layers] = (status, peak)
        if status not in ("ok", "oom"):
            raise SeqParError(f"--layers fit: {layers} layers failed for another reason: {status}")
        if status == "ok":
            found.layers = max(found.layers, layers)
        return peak if status == "ok" else None

    one = peak_of(1)
    if one is None:
        raise SeqParError(
            "--layers fit: not one layer fits; use shorter --tokens, more ranks or a smaller model"
        )
    if most == 1 or (two := peak_of(2)) is None:
        return found
    each = max(two - one, 1)
    guess = max(2, min(most, 1 + int((SHARE * limit_bytes - one) / each)))
    while guess > found.layers and peak_of(guess) is None:
        guess -= max(1, guess // 8)
    return found
