# SPDX-License-Identifier: Apache-2.0
"""The order of layouts: by predicted time, and among those that it cannot tell apart, by thrift.

Predicted step times of runs that the constants were not fitted to are off by about 4%
(docs/planner.md), so a layout that looks 2% faster may well be slower. Times within a band of 5%
above the fastest are taken as equal, those of the next 5% as equal among themselves, and so on. In
a band the layout with the fewest ranks a model replica comes first, then the smaller micro-batch,
then the smaller TP: what the Layouts study found to win by measuring.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TypeVar

from .layout import Layout

BAND = 0.05


_Item = TypeVar("_Item")


def ranked(
    items: Iterable[_Item], time: Callable[[_Item], float], layout: Callable[[_Item], Layout]
) -> list[_Item]:
    """`items` in that order; `time` is an item's predicted seconds, `layout` its layout."""
    known = list(items)
    if not known:
        return []
    best = min(time(item) for item in known)

    def key(item: _Item) -> tuple[float, ...]:
        seconds, made = time(item), layout(item)
        band = math.floor(math.log(seconds / best) / math.log1p(BAND) + 1e-9)
        replica = made.tp * made.sp * made.pp
        return (band, replica, made.micro_batch, made.tp, seconds)

    return sorted(known, key=key)
