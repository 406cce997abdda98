# SPDX-License-Identifier: Apache-2.0
"""Token layouts: which tokens of the sequence each rank of the SP axis owns.

Everything here counts in *global* token positions, `0 <= position < seq_length`, and needs no
torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

from ..errors import ScheduleError


class Span(NamedTuple):
    """A half-open range of global token positions."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of tokens."""
        return self.stop - self.start

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
    base, longer = divmod(seq_length, size)
    return tuple(base + (rank < longer) for rank in range(size))


@dataclass(frozen=True)
class ContiguousLayout:
    """Rank r owns one chunk; chunks follow one another in rank order and may differ in length.

    Attributes:
        lengths: tokens owned by each rank, every one at least 1.
    """

    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        short = [rank for rank, length in enumerate(self.lengths) if length < 1]
        if short or not self.lengths:
            raise ScheduleError(
                f"lengths={self.lengths}: ranks {short} own no token; give each >= 1"
            )

    @classmethod
    def of(
        cls, size: int, *, seq_length: int | None = None, lengths: Sequence[int] | None = None
    ) -> ContiguousLayout:
        """Build from a total (split evenly) or from explicit chunk lengths: exactly one of them."""
        if (seq_length is None) == (lengths is None):
            raise ScheduleError("give exactly one of seq_length and lengths")
        if lengths is None:
            assert seq_length is not None
            return cls(even_lengths(seq_length, size))
        if len(lengths) != size:
            raise ScheduleError(f"lengths has {len(lengths)} entries but size={size}")
        return cls(tuple(int(length) for length in lengths))

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.lengths)

    @property
    def seq_length(self) -> int:
        """Tokens of the whole sequence."""
        return sum(self.lengths)

    @cached_property
    def chunks(self) -> tuple[Span, ...]:
        """The chunk of each rank."""
        ends = tuple(accumulate(self.lengths))
        return tuple(
            Span(end - length, end) for end, length in zip(ends, self.lengths, strict=True)
        )

    @cached_property
    def _owner_of_start(self) -> dict[int, int]:
        return {chunk.start: rank for rank, chunk in enumerate(self.chunks)}

    def owner(self, span: Span) -> int:
        """The rank that owns every token of `span`; `ScheduleError` if no single rank does."""
        rank = self._owner_of_start.get(span.start)
        if rank is None:
            rank = next(
                (r for r, c in enumerate(self.chunks) if c.start <= span.start < c.stop), -1
            )
        if rank < 0 or span.stop > self.chunks[rank].stop or span.size < 1:
            raise ScheduleError(f"tokens {span} are not owned by one rank of {self.lengths}")
        return rank

    def local(self, rank: int, span: Span) -> slice:
        """Where `span` lies in the local tensor of its owner `rank` (a slice of the token dim)."""
        start = self.chunks[rank].start
        return slice(span.start - start, span.stop - start)
