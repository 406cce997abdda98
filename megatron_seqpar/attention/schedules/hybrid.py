# SPDX-License-Identifier: Apache-2.0
"""Two-level schedules for several nodes: one rule inside a node, another across nodes.

The ranks of a node act as one worker of the outer schedule (`balanced` or `zigzag`, see there), on
the tokens that they own together; inside, they share each of its rectangles:

    ulysses     by heads: what crosses between nodes is cut m ways among the m ranks of a node
    allgather   by queries: keys and values cross once a node, to one of its ranks, which passes
                them on over the fast links and sums up the gradients that go back

So the slow links carry what an outer schedule of P/m workers moves, not one of P.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from ...errors import ScheduleError
from ..ir import Placed, Problem
from ..layouts import Span
from ..masks import Causal
from ..placement import Placement
from . import balanced, ulysses, zigzag


def place(problem: Problem, *, inner: str, outer: str) -> Placement:
    """Place the rectangles.

    Raises `ScheduleError` where a node holds one rank or all of them, and for masks and token
    layouts that the outer schedule does not serve.
    """
    name, m = f"{inner}+{outer}", problem.node_size
    if not 1 < m < problem.size:
        raise ScheduleError(
            f"schedule {name!r} needs several nodes of several ranks; node_size={m} of "
            f"{problem.size} ranks: use balanced, zigzag, ulysses or auto"
        )
    nodes = problem.size // m
    if outer == "balanced":
        balanced.check(problem, name)
        chunks = problem.layout.chunks
        node_chunks = [
            Span(chunks[node * m].start, chunks[node * m + m - 1].stop) for node in range(nodes)
        ]
        cells = balanced.cells(node_chunks, isinstance(problem.mask, Causal))
    else:
        cells = zigzag.cells(problem, nodes)
    divide = _by_heads if inner == "ulysses" else _by_queries
    tiles = [
        placed._replace(step=cell.step * 2 + placed.step, rank=cell.rank * m + placed.rank)
        for cell in cells
        for placed in divide(problem, cell, m)
    ]
    return Placement(_without_gaps(tiles), gateways=inner == "allgather")


def _by_heads(problem: Problem, cell: Placed, ranks: int) -> Iterator[Placed]:
    for rank in range(ranks):
        yield from ulysses.share(problem, cell.q, cell.kv, rank, ranks)


def _by_queries(problem: Problem, cell: Placed, ranks: int) -> Iterator[Placed]:
    """Queries cut into ranges of equal work, at owners' boundaries where one is near."""
    cuts = [
        _snap(problem, cell.q, ulysses.row(problem, cell.q, cell.kv, Fraction(rank, ranks)))
        for rank in range(ranks + 1)
    ]
    for rank in range(ranks):
        yield Placed(0, rank, Span(cuts[rank], cuts[rank + 1]), cell.kv)


def _snap(problem: Problem, q: Span, row: int) -> int:
    """The owner's boundary next to `row` when it is within 1% of the range, else `row`."""
    near = [
        edge
        for _, part in problem.layout.split(q)
        for edge in part
        if 100 * abs(edge - row) <= q.size
    ]
    return min(near, key=lambda edge: abs(edge - row), default=row)


def _without_gaps(tiles: list[Placed]) -> list[Placed]:
    """Number the steps that are used from 0 on."""
    number = {step: at for at, step in enumerate(sorted({tile.step for tile in tiles}))}
    return [tile._replace(step=number[tile.step]) for tile in tiles]
