# SPDX-License-Identifier: Apache-2.0
"""The schedule builders, one a file, and `build_schedule`, which caches what they build.

To add one: write `schedules/<name>.py` with a function `place(problem) -> Placement`, and add it to
`BUILDERS`. `verify()` proves it; nothing else needs to know of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

from ...errors import ScheduleError
from ..ir import Problem
from ..layouts import ContiguousLayout
from ..masks import Causal, Mask, as_mask
from ..schedule import Schedule
from . import balanced, ring
from .placement import Placement

BUILDERS: dict[str, Callable[[Problem], Placement]] = {
    "balanced": balanced.place,
    "ring": ring.place,
}


def names() -> tuple[str, ...]:
    """Every name that `build_schedule` accepts."""
    return ("auto", *BUILDERS)


def build_schedule(
    name: str,
    *,
    size: int,
    seq_length: int | None = None,
    lengths: Sequence[int] | None = None,
    mask: Mask | str = Causal(),  # noqa: B008 - frozen
    query_heads: int = 1,
    kv_heads: int | None = None,
    head_dim: int = 128,
    value_dim: int | None = None,
) -> Schedule:
    """Build (or take from the cache) the forward schedule of one attention call.

    Args:
        name: a builder ("balanced", "ring") or "auto".
        size: ranks of the SP axis.
        seq_length: tokens of the whole sequence, split as evenly as can be; or
        lengths: tokens of each rank.
        mask: which pairs interact, or its name.
        query_heads, kv_heads, head_dim, value_dim: as in `Problem`; kv_heads defaults to
            query_heads,
            value_dim to head_dim. They only count for bytes and for "auto".

    Raises:
        ScheduleError: unknown name, sizes that cannot be split, or a mask the builder does not
        serve.
    """
    problem = Problem(
        layout=ContiguousLayout.of(size, seq_length=seq_length, lengths=lengths),
        mask=as_mask(mask),
        query_heads=query_heads,
        kv_heads=query_heads if kv_heads is None else kv_heads,
        head_dim=head_dim,
        value_dim=head_dim if value_dim is None else value_dim,
    )
    return _cached(name, problem)


@lru_cache(maxsize=512)
def _cached(name: str, problem: Problem) -> Schedule:
    if name == "auto":
        from .auto import choose

        return choose(_cached(builder, problem) for builder in BUILDERS)
    if name not in BUILDERS:
        raise ScheduleError(f"schedule={name!r} is unknown; use one of {', '.join(names())}")
    placement = BUILDERS[name](problem)
    return Schedule.of(name, problem, placement.tiles, placement.relay)
