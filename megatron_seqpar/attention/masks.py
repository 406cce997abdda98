# SPDX-License-Identifier: Apache-2.0
"""Masks: which (query, key/value) pairs interact, as ranges and never as a matrix.

Note: one form for all masks
----------------------------
Every mask is a list of *regions* that do not overlap. A region is a rectangle of queries and keys
cut by a band of diagonals: query i sees key j of it when `low <= j - i <= high`.

    causal        one region, high = 0
    window        one region, low = -left, high = right (and the sink tokens' columns)
    prefix        all queries x prefix, and the rest x the rest with high = 0
    documents     one region a document (or what its inner mask says)
    ranges        as given

A schedule places rectangles; what of a region lies in a rectangle is again a region, so one rule
(`Region.clip`) turns any mask into tiles, and one formula (`Region.pairs`) counts any tile's work.

A mask is a small frozen value: it is hashable (built schedules are cached by it) and needs no
torch.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import accumulate, pairwise
from typing import NamedTuple, Protocol

from ..errors import ScheduleError
from .layouts import Span


class TileKind(Enum):
    """What a kernel must be told about one (query range, key/value range) tile."""

    FULL = "full"  # every pair interacts
    CAUSAL = "causal"  # a square on the diagonal: key j is seen by query i when j <= i
    BAND = "band"  # any other band of diagonals


class Region(NamedTuple):
    """A rectangle of pairs cut by a band: query i sees key j when low <= j - i <= high.

    None for `low` or `high`: not cut on that side.
    """

    q: Span
    kv: Span
    low: int | None = None
    high: int | None = None

    @property
    def pairs(self) -> int:
        """How many (query, key) pairs interact."""
        upper = self.q.size * self.kv.size if self.high is None else self._at_most(self.high)
        return upper - (0 if self.low is None else self._at_most(self.low - 1))

    @property
    def kind(self) -> TileKind:
        """What a kernel must be told, of a region that `clip` returned."""
        if self.low is None and self.high is None:
            return TileKind.FULL
        square = self.q.size == self.kv.size and self.high == self.kv.start - self.q.start
        return TileKind.CAUSAL if square and self.low is None else TileKind.BAND

    def clip(self, q: Span, kv: Span) -> Region | None:
        """The part inside a rectangle, without rows and columns of no pair; None if empty.

        Its `low` and `high` are None where they cut nothing off, so a kernel's window sizes of it
        are never negative.
        """
        (a, b), (c, d), low, high = self.q.meet(q), self.kv.meet(kv), self.low, self.high
        if high is not None:
            a, d = max(a, c - high), min(d, b + high)
        if low is not None:
            b, c = min(b, d - low), max(c, a + low)
        if a >= b or c >= d:
            return None
        if high is not None and d - 1 - a <= high:
            high = None
        if low is not None and c - (b - 1) >= low:
            low = None
        return Region(Span(a, b), Span(c, d), low, high)

    def shift(self, by: int) -> Region:
        """The same region `by` positions further on."""
        (a, b), (c, d) = self.q, self.kv
        return Region(Span(a + by, b + by), Span(c + by, d + by), self.low, self.high)

    def _at_most(self, high: int) -> int:
        """Pairs of the rectangle with j - i <= high."""
        keys = self.kv.size
        first = self.q.start + high + 1 - self.kv.start  # keys of the first query, not yet clamped

        def total(last: int) -> int:  # sum of clamp(x, 0, keys) for x <= last
            if last <= 0:
                return 0
            inside = min(last, keys)
            return inside * (inside + 1) // 2 + (last - inside) * keys

        return total(first + self.q.size - 1) - total(first - 1)


class Mask(Protocol):
    """What a schedule asks of a mask."""

    @property
    def name(self) -> str:
        """The mask's name in messages and on the command line."""

    def regions(self, seq_length: int) -> tuple[Region, ...]:
        """The interacting pairs of a sequence; regions share no pair."""


@dataclass(frozen=True)
class Causal:
    """Query i sees keys j <= i, positions counted over the whole sequence."""

    name: str = field(default="causal", init=False)

    def regions(self, seq_length: int) -> tuple[Region, ...]:
        """One region."""
        whole = Span(0, seq_length)
        return (Region(whole, whole, None, 0),)


@dataclass(frozen=True)
class Full:
    """Every query sees every key (encoders, cross-checks)."""

    name: str = field(default="full", init=False)

    def regions(self, seq_length: int) -> tuple[Region, ...]:
        """One region."""
        whole = Span(0, seq_length)
        return (Region(whole, whole),)


@dataclass(frozen=True)
class SlidingWindow:
    """Query i sees keys i - left <= j <= i + right, and the first `sink_tokens` keys j <= i.

    Attributes:
        left, right: as in Megatron's `--window-size left,right`; -1 for no limit on that side.
        sink_tokens: keys at the start of the sequence that every later query sees as well
            (attention sinks, arXiv 2309.17453).
    """

    left: int
    right: int = 0
    sink_tokens: int = 0
    name: str = field(default="window", init=False)

    def __post_init__(self) -> None:
        if self.left < -1 or self.right < -1 or self.sink_tokens < 0:
            raise ScheduleError(
                f"window: left={self.left}, right={self.right} must be >= 0 (or -1 for no limit) "
                f"and sink_tokens={self.sink_tokens} >= 0"
            )

    def regions(self, seq_length: int) -> tuple[Region, ...]:
        """The band, and left of it the sink tokens' columns."""
        whole = Span(0, seq_length)
        low = None if self.left < 0 else -self.left
        high = None if self.right < 0 else self.right
        regions = [Region(whole, whole, low, high)]
        if low is not None and self.sink_tokens:
            sinks = Span(0, min(self.sink_tokens, seq_length))
            regions.append(Region(whole, sinks, None, low - 1))
        return tuple(r for region in regions if (r := region.clip(whole, whole)) is not None)


@dataclass(frozen=True)
class Prefix:
    """Prefix-LM: every query sees the first `length` keys, later keys only causally."""

    length: int
    name: str = field(default="prefix", init=False)

    def __post_init__(self) -> None:
        if self.length < 0:
            raise ScheduleError(f"prefix: length={self.length} must be >= 0")

    def regions(self, seq_length: int) -> tuple[Region, ...]:
        """All queries x the prefix, and the causal rest."""
        length = min(self.length, seq_length)
        rest = Span(length, seq_length)
        regions = Region(Span(0, seq_length), Span(0, length)), Region(rest, rest, None, 0)
        return tuple(region for region in regions if region.q.size and region.kv.size)


@dataclass(frozen=True)
class Documents:
    """Packed documents: tokens see only tokens of their own document.

    Attributes:
        cu_seqlens: ends of the documents, starting with 0, never decreasing. Tokens after the last
            end see nothing and are seen by none (padding).
        inner: the mask inside each document, in positions counted from its start.
    """

    cu_seqlens: tuple[int, ...]
    inner: Mask = Causal()
    name: str = field(default="documents", init=False)

    def __post_init__(self) -> None:
        ends = self.cu_seqlens
        if not ends or ends[0] != 0 or any(b < a for a, b in pairwise(ends)):
            raise ScheduleError(f"cu_seqlens={ends[:8]}: must start with 0 and never decrease")

    def regions(self, seq_length: int) -> tuple[Region, ...]:
        """The inner mask's regions, document by document."""
        ends = self.cu_seqlens
        if ends[-1] > seq_length:
            raise ScheduleError(f"cu_seqlens end at {ends[-1]}, after {seq_length} tokens")
        return tuple(
            region.shift(start)
            for start, stop in pairwise(ends)
            if stop > start
            for region in self.inner.regions(stop - start)
        )


@dataclass(frozen=True)
class Ranges:
    """A general block mask: any regions that share no pair.

    Attributes:
        blocks: the regions; `Ranges.of` makes them from plain tuples.
    """

    blocks: tuple[Region, ...]
    name: str = field(default="ranges", init=False)

    @classmethod
    def of(cls, blocks: Iterable[tuple[tuple[int, int], tuple[int, int], str]]) -> Ranges:
        """From (query range, key range, kind), all half-open.

        Kinds: "full"; "causal", whose diagonal ends in the last query and the last key; "inverse",
        whose diagonal starts in the first query and the first key and leaves out what is left of
        it; "both".
        """
        made = []
        for q, kv, kind in blocks:
            if kind not in ("full", "causal", "inverse", "both"):
                raise ScheduleError(f"kind={kind!r}: use full, causal, inverse or both")
            low = kv[0] - q[0] if kind in ("inverse", "both") else None
            high = kv[1] - q[1] if kind in ("causal", "both") else None
            if low is not None and high is not None and low > high:
                raise ScheduleError(
                    f"ranges: kind='both' of queries {q} and keys {kv} needs as many keys as "
                    "queries, or more"
                )
            made.append(Region(Span(*q), Span(*kv), low, high))
        return cls(tuple(made))

    def regions(self, seq_length: int) -> tuple[Region, ...]:
        """The blocks; `ScheduleError` when one leaves the sequence or two share a pair."""
        whole = Span(0, seq_length)
        kept = []
        for block in self.blocks:
            if block.q.meet(whole) != block.q or block.kv.meet(whole) != block.kv:
                raise ScheduleError(f"ranges: {block} leaves the sequence of {seq_length} tokens")
            clipped = block.clip(whole, whole)
            if clipped is not None:
                kept.append(clipped)
        for one, other in RegionIndex(kept).neighbours():
            common = _common(one, other)
            if common is not None:
                raise ScheduleError(f"ranges: {one} and {other} share pairs, all of {common}")
        return tuple(kept)


@dataclass(frozen=True)
class Samples:
    """A batch laid end to end: each sample of `seq_length` tokens under a mask of its own."""

    masks: tuple[Mask, ...]
    seq_length: int
    name: str = field(default="samples", init=False)

    def regions(self, seq_length: int) -> tuple[Region, ...]:
        """Every sample's regions, shifted to its place."""
        if seq_length != self.seq_length * len(self.masks):
            raise ScheduleError(
                f"samples: {len(self.masks)} of {self.seq_length} tokens are not {seq_length}"
            )
        return tuple(
            region.shift(number * self.seq_length)
            for number, mask in enumerate(self.masks)
            for region in mask.regions(self.seq_length)
        )


class RegionIndex:
    """Regions that can be asked for by rectangle."""

    def __init__(self, regions: Iterable[Region]) -> None:
        self.regions = sorted(regions, key=lambda r: (r.q, r.kv))
        self._starts = [region.q.start for region in self.regions]
        # the latest query end so far: it never decreases, so it can be searched
        self._ends = list(accumulate((region.q.stop for region in self.regions), max))

    def clip(self, q: Span, kv: Span) -> Iterator[Region]:
        """What of the mask lies in the rectangle, in pieces that each are one region."""
        for at in self._near(q):
            clipped = self.regions[at].clip(q, kv)
            if clipped is not None:
                yield clipped

    def neighbours(self) -> Iterator[tuple[Region, Region]]:
        """Every two regions that have queries in common."""
        for at, region in enumerate(self.regions):
            for before in self._near(region.q):
                if before < at and self.regions[before].q.stop > region.q.start:
                    yield self.regions[before], region

    def _near(self, q: Span) -> range:
        """Where the regions lie that may have queries of `q`."""
        return range(bisect_right(self._ends, q.start), bisect_left(self._starts, q.stop))

    def pairs(self, q: Span, kv: Span) -> int:
        """Interacting pairs of the rectangle."""
        return sum(region.pairs for region in self.clip(q, kv))

    def find(self, tile: Region) -> int | None:
        """The number of the region that has exactly `tile` in the tile's rectangle, or None."""
        for at in self._near(tile.q):
            if self.regions[at].clip(tile.q, tile.kv) == tile:
                return at
        return None


def _common(one: Region, other: Region) -> Region | None:
    clipped = one.clip(other.q, other.kv)
    if clipped is None:
        return None
    lows = [low for low in (clipped.low, other.low) if low is not None]
    highs = [high for high in (clipped.high, other.high) if high is not None]
    low, high = max(lows, default=None), min(highs, default=None)
    if low is not None and high is not None and low > high:
        return None
    return Region(clipped.q, clipped.kv, low, high).clip(clipped.q, clipped.kv)


MASKS = ("causal", "full", "window", "prefix", "documents")


def as_mask(mask: Mask | str) -> Mask:
    """A mask, or the one a text names.

    Texts: `causal`, `full`, `window:LEFT[,RIGHT[,SINKS]]`, `prefix:LENGTH`, `documents:END,END,...`
    (ends of the documents, without the leading 0). `ScheduleError` lists the names.
    """
    if not isinstance(mask, str):
        return mask
    name, _, rest = mask.partition(":")
    try:
        numbers = [int(number) for number in rest.split(",")] if rest else []
        made = _named(name, numbers)
    except (TypeError, ValueError):
        made = None
    if made is None:
        raise ScheduleError(
            f"mask={mask!r} is unknown; use one of causal, full, window:LEFT[,RIGHT[,SINKS]], "
            "prefix:LENGTH, documents:END,END,..."
        )
    return made


def _named(name: str, numbers: Sequence[int]) -> Mask | None:
    if name in ("causal", "full") and not numbers:
        return Causal() if name == "causal" else Full()
    if name == "window":
        return SlidingWindow(*numbers)
    if name == "prefix":
        return Prefix(*numbers)
    if name == "documents" and numbers:
        return Documents((0, *numbers))
    return None
