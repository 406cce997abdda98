# SPDX-License-Identifier: Apache-2.0
"""What the attention benchmark measures: sizes, ways to split attention, and their schedules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..attention import Schedule, TokenLayout, build_schedule
from .place import Place

ONE_RANK = "one rank"
BUSY = "one rank, all busy"


@dataclass(frozen=True)
class Sizes:
    """Of the tensors: heads, dims, samples, dtype by torch's name, and the mask's text."""

    heads: int
    kv_heads: int
    head_dim: int
    batch: int
    dtype: str
    mask: str


@dataclass(frozen=True)
class Way:
    """One way to split attention."""

    schedule: str
    token_layout: str = "contiguous"
    overlap: bool = True

    @property
    def name(self) -> str:
        """As tables and pictures show it."""
        tokens = "" if self.token_layout == "contiguous" else f", {self.token_layout} tokens"
        return f"{self.schedule}{tokens}{'' if self.overlap else ', no overlap'}"


@dataclass(frozen=True)
class Cell:
    """What is measured in the same rounds: a kernel, a length, and the ways that serve it."""

    kernel: str
    tokens: int
    ways: tuple[Way, ...]


def ways_of(schedules: Sequence[str], layouts: Sequence[str], without_overlap: bool) -> list[Way]:
    """Every schedule on every token layout, with overlap and, if wanted, without."""
    overlaps = (True, False) if without_overlap else (True,)
    return [Way(s, layout, o) for layout in layouts for s in schedules for o in overlaps]


def layout_of(way: Way, ranks: int, tokens: int) -> TokenLayout:
    """Who owns which tokens."""
    if way.token_layout == "zigzag":
        return TokenLayout.zigzag(ranks, tokens)
    return TokenLayout.contiguous(ranks, seq_length=tokens)


def plan_of(way: Way, place: Place, tokens: int, sizes: Sizes) -> Schedule:
    """The schedule that a way runs. ScheduleError or UnsupportedError where it cannot."""
    return build_schedule(
        way.schedule,
        layout=layout_of(way, place.ranks, tokens),
        mask=sizes.mask,
        query_heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        node_size=place.node_size,
        dtype=sizes.dtype,
        device=place.device,
        batch=sizes.batch,
    )
