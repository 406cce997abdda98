# SPDX-License-Identifier: Apache-2.0
"""Token layouts: which tokens of the sequence each rank of the SP axis owns.

Everything here counts in *global* token positions, `0 <= position < seq_length`, and needs no
torch. A rank's local tensor holds its pieces one after another.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import NamedTuple

from ..errors import ScheduleError


class Span(NamedTuple):
    """A half-open range of global token positions (or of heads)."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of tokens."""
        return self.stop - self.start

    def meet(self, other: Span) -> Span:
        """The common part; its size is below 1 when there is none."""
        return Span(max(self.start, other.start), min(self.stop, other.stop))

    def within(self, other: Span) -> slice:
        """Where this span lies in a tensor that holds `other`."""
        return slice(self.start - other.start, self.stop - other.start)

    def __str__(self) -> str:
        return f"[{self.start},{self.stop})"


def even_lengths(seq_length: int, size: int) -> tuple[int, ...]:
    """Split `seq_length` tokens into `size` chunks that differ by one token at the most.

    The longer chunks come first. Raises `ScheduleError` if a rank would own no token.
    """
    if size < 1:
        raise ScheduleError(f"size={size}: the SP axis needs at least one rank")
    if seq_length < size:
        raise ScheduleError(
            f"seq_length={seq_length} is shorter than size={size}: every rank of the SP axis must "
            f"own a token; use size <= {max(seq_length, 1)} or a longer sequence"
        )
    return _shares(seq_length, size)


def even_spans(whole: Span, count: int) -> list[Span]:
    """Cut a span into `count` parts, as even as can be, longer ones first; some may be empty."""
    ends = list(accumulate(_shares(whole.size, count), initial=whole.start))
    return [Span(start, stop) for start, stop in pairwise(ends)]


def _shares(total: int, count: int) -> tuple[int, ...]:
    base, longer = divmod(total, count)
    return tuple(base + (index < longer) for index in range(count))


@dataclass(frozen=True)
class TokenLayout:
    """Which tokens each rank owns; every token has one owner.

    Attributes:
        pieces: per rank its spans, in the order in which its local tensor holds them.
        name: "contiguous", "zigzag" or "pieces".
    """

    pieces: tuple[tuple[Span, ...], ...]
    name: str = "pieces"

    def __post_init__(self) -> None:
        short = [rank for rank, length in enumerate(self.lengths) if length < 1]
        if short or not self.pieces:
            raise ScheduleError(
                f"lengths={self.lengths}: ranks {short} own no token; give each >= 1"
            )
        end = 0
        for span, _, _ in self._table:
            if span.size < 1 or span.start != end:
                raise ScheduleError(f"token layout: tokens from {end} to {span} have no one owner")
            end = span.stop

    @classmethod
    def contiguous(
        cls, size: int, *, seq_length: int | None = None, lengths: Sequence[int] | None = None
    ) -> TokenLayout:
        """Rank r owns the r-th chunk, from a total (split evenly) or from chunk lengths."""
        if (seq_length is None) == (lengths is None):
            raise ScheduleError("give exactly one of seq_length and lengths")
        if lengths is None:
            assert seq_length is not None
            lengths = even_lengths(seq_length, size)
        if len(lengths) != size:
            raise ScheduleError(f"lengths has {len(lengths)} entries but size={size}")
        ends = list(accumulate((int(length) for length in lengths), initial=0))
        spans = pairwise(ends)
        return cls(tuple((Span(start, stop),) for start, stop in spans), "contiguous")

    @classmethod
    def zigzag(cls, size: int, seq_length: int) -> TokenLayout:
        """Rank r owns pieces r and 2P-1-r of 2P pieces as even as can be (as stock CP cuts)."""
        even_lengths(seq_length, size)
        parts = even_spans(Span(0, seq_length), 2 * size)
        pieces = (
            tuple(part for part in (parts[rank], parts[2 * size - 1 - rank]) if part.size)
            for rank in range(size)
        )
        return cls(tuple(pieces), "zigzag")

    def repeated(self, batch: int) -> TokenLayout:
        """The layout of `batch` such sequences laid end to end, each cut in this way."""
        shift = self.seq_length
        pieces = tuple(
            tuple(
                Span(span.start + sample * shift, span.stop + sample * shift)
                for sample in range(batch)
                for span in spans
            )
            for spans in self.pieces
        )
        return self if batch == 1 else TokenLayout(pieces)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.pieces)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens owned by each rank."""
        return tuple(sum(span.size for span in spans) for spans in self.pieces)

    @cached_property
    def seq_length(self) -> int:
        """Tokens of the whole sequence."""
        return sum(self.lengths)

    @property
    def chunks(self) -> tuple[Span, ...]:
        """The one chunk of each rank; `ScheduleError` where a rank owns several pieces."""
        if any(len(spans) != 1 for spans in self.pieces):
            raise ScheduleError(f"a {self.name} token layout has no one chunk a rank")
        return tuple(spans[0] for spans in self.pieces)

    @cached_property
    def _table(self) -> list[tuple[Span, int, int]]:
        """(piece, rank, its offset in the rank's local tensor), in token order."""
        table = []
        for rank, spans in enumerate(self.pieces):
            offset = 0
            for span in spans:
                table.append((span, rank, offset))
                offset += span.size
        return sorted(table)

    @cached_property
    def _starts(self) -> list[int]:
        return [span.start for span, _, _ in self._table]

    def split(self, span: Span) -> Iterator[tuple[int, Span]]:
        """`span` by owner: (rank, part), in token order."""
        at = bisect_right(self._starts, span.start) - 1
        while at < len(self._table) and self._table[at][0].start < span.stop:
            piece, rank, _ = self._table[at]
            yield rank, piece.meet(span)
            at += 1

    def owner(self, span: Span) -> int:
        """The rank that owns every token of `span`; `ScheduleError` if no single rank does."""
        owners = set()
        if span.size > 0 and span.start >= 0 and span.stop <= self.seq_length:
            owners = {rank for rank, _ in self.split(span)}
        if len(owners) != 1:
            raise ScheduleError(f"tokens {span} are not owned by one rank of {self.lengths}")
        return owners.pop()

    def owns(self, rank: int, span: Span) -> bool:
        """Whether `rank` owns every token of `span`."""
        return all(owner == rank for owner, _ in self.split(span))

    def local(self, rank: int, span: Span) -> slice:
        """Where `span` lies in the local tensor of its owner (a slice of the token dim).

        Raises `ScheduleError` when `rank` does not hold `span` in one piece of its tensor.
        """
        at = bisect_right(self._starts, span.start) - 1
        piece, owner, offset = self._table[max(at, 0)]
        start = offset + span.start - piece.start
        stop, end = start + piece.stop - span.start, piece.stop
        while end < span.stop and at + 1 < len(self._table):
            # pieces that follow one another both in the sequence and in the local tensor
            at += 1
            piece, next_owner, offset = self._table[at]
            if next_owner != owner or offset != stop:
                break
            stop, end = offset + piece.size, piece.stop
        if owner != rank or end < span.stop:
            raise ScheduleError(f"rank {rank} does not hold tokens {span} in one piece")
        return slice(start, start + span.size)
