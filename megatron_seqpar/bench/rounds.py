# SPDX-License-Identifier: Apache-2.0
"""Ways measured in turn: what a drifting machine does to one, it does to all of a round.

A round measures every way once. Their order turns by one from round to round, so that none always
runs behind the same other. A ratio of two ways is the median over rounds of the ratio within one.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

Measured = TypeVar("Measured")
Round = Mapping[str, float]


def interleave(
    ways: Sequence[str],
    rounds: int,
    measure: Callable[[str, int], Measured],
) -> list[dict[str, Measured]]:
    """`rounds` rounds of `measure(way, round)`, keyed by way in the order of `ways`."""
    found = []
    for number in range(rounds):
        at = number % len(ways) if ways else 0
        row = {name: measure(name, number) for name in [*ways[at:], *ways[:at]]}
        found.append({name: row[name] for name in ways})
    return found


def median_ratio(rounds: Iterable[Round], above: str, below: str) -> float | None:
    """Median over rounds of one way's number over another's; None where a way is missing."""
    ratios = [row[above] / row[below] for row in rounds if above in row and below in row]
    return statistics.median(ratios) if ratios else None


def spread(values: Sequence[float]) -> dict[str, Any]:
    """`seconds`, the median, with the least, the most and all of them in order."""
    return {
        "seconds": statistics.median(values),
        "seconds_least": min(values),
        "seconds_most": max(values),
        "seconds_by_round": list(values),
    }
