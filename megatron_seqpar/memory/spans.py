# SPDX-License-Identifier: Apache-2.0
"""Cut a length into as many pieces as asked for."""

from __future__ import annotations


def spans(length: int, count: int) -> list[tuple[int, int]]:
    """[start, stop) of `count` pieces that cover `length` in order.

    Lengths differ by one at most, the longer pieces first, so a length that does not divide has no
    short tail. A length below `count` gives one piece an element. Raises ValueError for a count
    below 1 or a negative length.
    """
    if count < 1 or length < 0:
        raise ValueError(f"cannot cut {length} into {count} pieces")
    count = max(1, min(count, length))
    short, longer = divmod(length, count)
    stops = [(index + 1) * short + min(index + 1, longer) for index in range(count)]
    return list(zip([0, *stops[:-1]], stops, strict=True))
