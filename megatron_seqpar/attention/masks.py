# SPDX-License-Identifier: Apache-2.0
"""Masks: which (query, key/value) pairs interact, asked about ranges and never materialised.

A mask is a small frozen value: it is hashable (built schedules are cached by it), needs no torch,
and answers two questions about a tile: how many pairs interact, and what a kernel must be told.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from ..errors import ScheduleError
from .layouts import Span


class TileKind(Enum):
    """What a kernel must be told about one (query range, key/value range) tile."""

    EMPTY = "empty"  # no pair interacts: nothing to compute
    FULL = "full"  # every pair interacts
    CAUSAL = "causal"  # a square tile on the diagonal: key j is seen by query i when j <= i
    PARTIAL = "partial"  # anything else: a schedule must split it further


class Mask(Protocol):
    """What a schedule asks of a mask."""

    @property
    def name(self) -> str:
        """The mask's name in messages and on the command line."""

    def pairs(self, q: Span, kv: Span) -> int:
        """How many (query, key) pairs of the tile interact."""

    def kind(self, q: Span, kv: Span) -> TileKind:
        """What the kernel must be told about the tile."""


@dataclass(frozen=True)
class Causal:
    """Query i sees keys j <= i, positions counted over the whole sequence."""

    name: str = "causal"

    def pairs(self, q: Span, kv: Span) -> int:
        """Interacting pairs of the tile, exactly."""
        return (
            _triangle(q.stop, kv.stop)
            - _triangle(q.start, kv.stop)
            - _triangle(q.stop, kv.start)
            + _triangle(q.start, kv.start)
        )

    def kind(self, q: Span, kv: Span) -> TileKind:
        """FULL below the diagonal, CAUSAL on it when square and aligned."""
        if q.size < 1 or kv.size < 1 or q.stop <= kv.start:
            return TileKind.EMPTY
        if kv.stop <= q.start + 1:
            return TileKind.FULL
        return TileKind.CAUSAL if q == kv else TileKind.PARTIAL


@dataclass(frozen=True)
class Full:
    """Every query sees every key (encoders, cross-checks)."""

    name: str = "full"

    def pairs(self, q: Span, kv: Span) -> int:
        """Interacting pairs of the tile: all of them."""
        return q.size * kv.size

    def kind(self, q: Span, kv: Span) -> TileKind:
        """FULL unless a range is empty."""
        return TileKind.FULL if q.size > 0 and kv.size > 0 else TileKind.EMPTY


def _triangle(queries: int, keys: int) -> int:
    """Pairs j <= i with i < queries and j < keys."""
    square = min(queries, keys)
    return square * (square + 1) // 2 + (queries - square) * keys


MASKS: dict[str, Mask] = {"causal": Causal(), "full": Full()}


def as_mask(mask: Mask | str) -> Mask:
    """A mask, or the one of that name; `ScheduleError` lists the names."""
    if not isinstance(mask, str):
        return mask
    if mask not in MASKS:
        raise ScheduleError(f"mask={mask!r} is unknown; use one of {', '.join(MASKS)}")
    return MASKS[mask]
