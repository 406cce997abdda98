# SPDX-License-Identifier: Apache-2.0
"""`auto`: choose among the built schedules.

The one with the least work on the critical path wins; ties go to the one whose busiest rank sends
fewest bytes, forward and backward together, then to the earlier name in the registry.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..schedule import Schedule


def choose(candidates: Iterable[Schedule]) -> Schedule:
    """The best candidate; all must solve the same problem."""
    return min(candidates, key=_cost)


def _cost(schedule: Schedule) -> tuple[int, int]:
    ranks = range(schedule.size)
    busiest = max(
        schedule.bytes_sent(rank, "forward") + schedule.bytes_sent(rank, "backward")
        for rank in ranks
    )
    return schedule.critical_work, busiest
