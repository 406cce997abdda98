# SPDX-License-Identifier: Apache-2.0
"""The order of layouts: by predicted time, and among those that it cannot tell apart, by thrift.

Predicted step times of runs that the constants were not fitted to are off by 4% in the mean
(docs/planner.md), so the ratio of two of them is off by 7 or 8% at one standard deviation: a layout
that looks 5% faster may well be slower. Times within a band of 8% above the fastest are taken as
equal, those of the next 8% as equal among themselves, and so on. In a band the
layout with the least TP x PP comes first, then the one with the smaller SP, micro-batch and TP: the
Layouts study, which had no SP, found by measuring that little TP x PP and small micro-batches win.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TypeVar

from .layout import Layout

BAND = 0.08


_Item = TypeVar("_Item")


def ranked(
    items: Iterable[_Item],
    time: Callable[[_Item], float],
    layout: Callable[[_Item], Layout],
    band: float = BAND,
) -> list[_Item]:
    """`items` in that order; `time` is an item's predicted seconds, `layout` its layout.

    band: width of a band as a share, above 0.
    """
    known = list(items)
    if not known:
        return []
    best = min(time(item) for item in known)

    def key(item: _Item) -> tuple[float, ...]:
        seconds, made = time(item), layout(item)
        step = math.floor(math.log(seconds / best) / math.log1p(band) + 1e-9)
        return (step, made.tp * made.pp, made.sp, made.micro_batch, made.tp, seconds)

    return sorted(known, key=key)
