# SPDX-License-Identifier: Apache-2.0
"""The schedule builders, one a file, and `build_schedule`, which caches what they build.

To add one: write `schedules/<name>.py` with a function `place(problem) -> Placement`, and add it to
`BUILDERS`. `verify()` proves it; nothing else needs to know of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial

from ...errors import ScheduleError
from ..ir import Problem
from ..layouts import TokenLayout
from ..masks import Causal, Mask, as_mask
from ..placement import Placement
from ..schedule import Schedule
from . import allgather, balanced, hybrid, ring, ulysses, zigzag

BUILDERS: dict[str, Callable[[Problem], Placement]] = {
    "balanced": balanced.place,
    "zigzag": zigzag.place,
    "ring": ring.place,
    "allgather": allgather.place,
    "ulysses": ulysses.place,
    "ulysses+balanced": partial(hybrid.place, inner="ulysses", outer="balanced"),
    "ulysses+zigzag": partial(hybrid.place, inner="ulysses", outer="zigzag"),
    "allgather+balanced": partial(hybrid.place, inner="allgather", outer="balanced"),
    "allgather+zigzag": partial(hybrid.place, inner="allgather", outer="zigzag"),
}


def names() -> tuple[str, ...]:
    """Every name that `build_schedule` accepts."""
    return ("auto", *BUILDERS)


def build_schedule(
    name: str,
    *,
    size: int | None = None,
    seq_length: int | None = None,
    lengths: Sequence[int] | None = None,
    layout: TokenLayout | None = None,
    mask: Mask | str = Causal(),  # noqa: B008 - frozen
    query_heads: int = 1,
    kv_heads: int | None = None,
    head_dim: int = 128,
    value_dim: int | None = None,
    node_size: int | None = None,
    dtype: object = "bfloat16",
) -> Schedule:
    """Build (or take from the cache) the forward schedule of one attention call.

    Args:
        name: a builder's name (`names()`) or "auto".
        size: ranks of the SP axis, whose tokens are
        seq_length: of the whole sequence, split as evenly as can be; or
        lengths: of each rank; or
        layout: any token layout, in place of the three.
        mask: which pairs interact, or its text.
        query_heads, kv_heads, head_dim, value_dim: as in `Problem`; kv_heads defaults to
            query_heads, value_dim to head_dim.
        node_size: as in `Problem`; default: all ranks are in one node.
        dtype: of q, k and v, for "auto".

    Raises:
        ScheduleError: unknown name, sizes that cannot be split, or a mask or token layout that the
        builder does not serve.
    """
    if layout is None:
        if size is None:
            raise ScheduleError("give size with seq_length or lengths, or a layout")
        layout = TokenLayout.contiguous(size, seq_length=seq_length, lengths=lengths)
    problem = Problem(
        layout=layout,
        mask=as_mask(mask),
        query_heads=query_heads,
        kv_heads=query_heads if kv_heads is None else kv_heads,
        head_dim=head_dim,
        value_dim=head_dim if value_dim is None else value_dim,
        node_size=layout.size if node_size is None else node_size,
    )
    return _cached(name, problem)


@lru_cache(maxsize=512)
def _cached(name: str, problem: Problem) -> Schedule:
    if name == "auto":
        from .auto import choose

        return choose(_cached(builder, problem) for builder in ("balanced", "ring"))
    if name not in BUILDERS:
        raise ScheduleError(f"schedule={name!r} is unknown; use one of {', '.join(names())}")
    return Schedule.of(name, problem, BUILDERS[name](problem))
