# SPDX-License-Identifier: Apache-2.0
"""The longest sequence that trains in a given amount of memory, by doubling and halving."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


class OtherFailure(Exception):
    """A length failed for another reason than memory or time: no limit can be read from it."""


@dataclass
class Longest:
    """What a search found.

    Attributes:
        tokens: the longest length that trained; 0 for none.
        at_least: longer ones may train: they took too long, or were beyond the search's end.
        tries: status of every length tried: ok, oom or too slow.
        seconds: a step's time at `tokens`.
    """

    tokens: int = 0
    at_least: bool = False
    tries: dict[int, str] = field(default_factory=dict)
    seconds: float | None = None


def search(
    attempt: Callable[[int], tuple[str, float | None]],
    *,
    start: int,
    unit: int,
    most: int,
    precision: float,
) -> Longest:
    """Double from `start`, then halve the gap, in multiples of `unit`, up to `most`.

    attempt: status of a length ('ok', 'oom', 'too slow' or anything else) and seconds a step.
    Raises OtherFailure for anything else, so that no failure passes for a limit.
    """
    found = Longest()
    fails: int | None = None

    def fits(length: int) -> bool:
        nonlocal fails
        status, seconds = attempt(length)
        found.tries[length] = status
        if status == "ok":
            found.tokens, found.seconds = length, seconds
            return True
        if status not in ("oom", "too slow"):
            raise OtherFailure(f"{length:,} tokens failed for another reason than memory: {status}")
        found.at_least = status == "too slow"
        fails = length
        return False

    length = start
    while fits(length):
        if length >= most:
            found.at_least = True
            return found
        length = min(2 * length, most)
    while fails is not None and not found.at_least:
        low = found.tokens
        middle = (low + fails) // 2 // unit * unit
        if middle <= low or (fails - low) <= precision * max(low, unit):
            break
        fits(middle)
    return found
