# SPDX-License-Identifier: Apache-2.0
"""The schedule builders, one a file, and `build_schedule`, which caches what they build.

To add one: write `schedules/<name>.py` with a function `place(problem) -> Placement`, and add it to
`BUILDERS`. `verify()` proves it; nothing else needs to know of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial

from ...errors import ScheduleError
from ...simulate import Cluster
from ..ir import Problem
from ..layouts import TokenLayout
from ..masks import Causal, Mask, as_mask
from ..placement import Placement
from ..schedule import Schedule
from . import allgather, balanced, hybrid, ring, solver, ulysses, zigzag
from .auto import Choice, Objective, choose

BUILDERS: dict[str, Callable[[Problem], Placement]] = {
    "balanced": balanced.place,
    "zigzag": zigzag.place,
    "ring": ring.place,
    "allgather": allgather.place,
    "ulysses": ulysses.place,
    "solver": solver.place,
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
    device: str = "cuda",
    batch: int = 1,
    objective: Objective = "time",
    cluster: Cluster | None = None,
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
        dtype, device, batch, objective, cluster: what "auto" goes by, see `choose`.

    Raises:
        ScheduleError: unknown name, sizes that cannot be split, or a mask or token layout that the
        builder does not serve.
    """
    problem = make_problem(
        size=size,
        seq_length=seq_length,
        lengths=lengths,
        layout=layout,
        mask=mask,
        query_heads=query_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        node_size=node_size,
    )
    if name == "auto":
        return explain(
            problem, objective=objective, cluster=cluster, dtype=dtype, device=device, batch=batch
        ).schedule
    return _built(name, problem)


def make_problem(
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
) -> Problem:
    """The problem that `build_schedule` solves; arguments as there."""
    if layout is None:
        if size is None:
            raise ScheduleError("give size with seq_length or lengths, or a layout")
        layout = TokenLayout.contiguous(size, seq_length=seq_length, lengths=lengths)
    return Problem(
        layout=layout,
        mask=as_mask(mask),
        query_heads=query_heads,
        kv_heads=query_heads if kv_heads is None else kv_heads,
        head_dim=head_dim,
        value_dim=head_dim if value_dim is None else value_dim,
        node_size=layout.size if node_size is None else node_size,
    )


def explain(
    problem: Problem,
    *,
    objective: Objective = "time",
    cluster: Cluster | None = None,
    dtype: object = "bfloat16",
    device: str = "cuda",
    batch: int = 1,
) -> Choice:
    """What "auto" chooses and from what; arguments and errors as of `auto.choose`."""
    name = str(dtype).removeprefix("torch.")
    return _chosen(problem, objective, cluster, name, device, batch)


@lru_cache(maxsize=64)
def _chosen(
    problem: Problem,
    objective: Objective,
    cluster: Cluster | None,
    dtype: str,
    device: str,
    batch: int,
) -> Choice:
    return choose(
        problem,
        _built,
        tuple(BUILDERS),
        objective=objective,
        cluster=cluster,
        dtype=dtype,
        device=device,
        batch=batch,
    )


# one problem's candidates at a time are enough: what is used again and again is one schedule a mask
@lru_cache(maxsize=64)
def _built(name: str, problem: Problem) -> Schedule:
    if name not in BUILDERS:
        raise ScheduleError(f"schedule={name!r} is unknown; use one of {', '.join(names())}")
    return Schedule.of(name, problem, BUILDERS[name](problem))
