# SPDX-License-Identifier: Apache-2.0
"""Cut a band of diagonals into rectangles and triangles that a plain kernel serves. No torch.

Note: the cuts
--------------
Three shapes are plain: a full rectangle, a *causal* square (query i sees keys j <= i) and an
*inverse* square (j >= i), which is causal once queries and keys are both read backwards.

    high alone           low and high, narrow          low and high, wide

    # # # c . .          # # . . . .  head             # # c .  upper rows: high alone
    # # # c c .          i i c . . .  two blocks       # # c c
    # # # c c c          . i c c . .  of w - 1 rows    # # # #  lower rows: low alone
    # # # # # #          . . i i c .                   i i i #
                         . . . i c c                   . i i #
                         . . . . # #  tail             . . i #

In a window of w keys, narrower than the keys of the tile, w - 1 rows are an inverse square beside a
causal one and nothing else; what changes from one such block of rows to the next is only where it
lies. Blocks are thus one piece, and a kernel computes them in one call as a batch, so
a band costs at most nine calls however narrow it is.
"""

from __future__ import annotations

from typing import NamedTuple


class Piece(NamedTuple):
    """`blocks` of equal shape, each one down and right of the one before by its `rows`.

    Attributes:
        q, kv: first query and first key of the first block, counted from the tile's start.
        rows, cols: queries and keys of each block; equal where there is more than one.
        low, high: (None, None) full, (None, 0) causal, (0, None) inverse; the latter two square.
        blocks: how many.
    """

    q: int
    kv: int
    rows: int
    cols: int
    low: int | None = None
    high: int | None = None
    blocks: int = 1

    @property
    def ranges(self) -> tuple[slice, slice]:
        """Queries and keys of all its blocks."""
        rows, cols = self.rows * self.blocks, self.cols * self.blocks
        return slice(self.q, self.q + rows), slice(self.kv, self.kv + cols)

    def shift(self, q: int, kv: int) -> Piece:
        """The same piece further down and right."""
        return self._replace(q=self.q + q, kv=self.kv + kv)

    def mirror(self, sq: int, skv: int) -> Piece:
        """The same piece when the queries and the keys of the tile are read backwards."""
        q, kv = sq - self.q - self.rows * self.blocks, skv - self.kv - self.cols * self.blocks
        return self._replace(q=q, kv=kv, low=self.high, high=self.low)


def pieces(sq: int, skv: int, low: int | None, high: int | None) -> list[Piece]:
    """Pieces that hold every pair `low <= j - i <= high` of `sq` x `skv` exactly once.

    None for `low` or `high`: not cut on that side. Raises `ValueError` for a band that leaves a row
    or a column without any pair.
    """
    below, above = min(0, skv - sq), max(0, skv - sq)
    if (low is not None and low > below) or (high is not None and high < above):
        raise ValueError(f"band {low}..{high} leaves queries or keys of {sq} x {skv} with no pair")
    low = None if low is None or low <= 1 - sq else low
    high = None if high is None or high >= skv - 1 else high
    if low is None:
        return _upper(sq, skv, high)
    if high is None:
        return _lower(sq, skv, low)
    head, tail = -low, skv - high  # first row that `low` may cut, first row that `high` does not
    if head > tail:  # rows between them see every key
        lower = _lower(sq - tail, skv, low + tail)
        return [*_upper(tail, skv, high), *(piece.shift(tail, 0) for piece in lower)]
    found = [*_upper(head, head + high, high)] if head else []
    found += (piece.shift(head, 0) for piece in _blocks(tail - head, high - low + 1))
    if sq > tail:
        last = _lower(sq - tail, skv - tail - low, 0)
        found += (piece.shift(tail, tail + low) for piece in last)
    return found


def _upper(sq: int, skv: int, high: int | None) -> list[Piece]:
    """Cut above alone: a rectangle, a causal square beside it, and rows below that see all."""
    if high is None or high >= skv - 1:
        return [Piece(0, 0, sq, skv)]
    square = skv - high
    found = [Piece(0, 0, square, high)] if high else []
    found.append(Piece(0, high, square, square, None, 0))
    return [*found, Piece(square, 0, sq - square, skv)] if sq > square else found


def _lower(sq: int, skv: int, low: int) -> list[Piece]:
    """Cut below alone: `_upper` read backwards."""
    return [piece.mirror(sq, skv) for piece in _upper(sq, skv, skv - sq - low)]


def _blocks(rows: int, width: int) -> list[Piece]:
    """Rows that each see `width` keys, each row's one further on than those of the row before."""
    if width == 1:
        return [Piece(0, 0, 1, 1, blocks=rows)]
    step = width - 1
    blocks, rest = divmod(rows, step)
    found = []
    if blocks:
        found += [
            _square(0, 0, step, 0, None, blocks),
            _square(0, step, step, None, 0, blocks),
        ]
    if rest:
        at = blocks * step
        found.append(_square(at, at, rest, 0, None))
        if step > rest:
            found.append(Piece(at, at + rest, rest, step - rest))
        found.append(_square(at, at + step, rest, None, 0))
    return found


def _square(
    q: int, kv: int, size: int, low: int | None, high: int | None, blocks: int = 1
) -> Piece:
    cut = (low, high) if size > 1 else (None, None)
    return Piece(q, kv, size, size, *cut, blocks)
