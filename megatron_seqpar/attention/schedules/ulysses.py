# SPDX-License-Identifier: Apache-2.0
"""`ulysses`: every rank computes some heads of the whole sequence (DeepSpeed Ulysses, 2309.14509).

Queries, keys and values of its heads come from every rank, outputs go back: about
2N(query heads + KV heads)/P elements of head dim a rank and pass, the least of all schedules when
there are heads enough, and one kernel call over the whole sequence.

Head counts need not divide. Think of the work of all heads laid end to end, heads one after
another and in each head its queries in order: every rank takes one P-th of that line. Its ends may
cut a head; then the ranks that share the head take different queries of it, with equal work. So
33 heads on 16 ranks, or 8 heads on 64, are balanced as well as 32 on 16; a KV head that several
ranks need goes to each of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from ..ir import Placed, Problem
from ..layouts import Span
from ..placement import Placement


def place(problem: Problem) -> Placement:
    """Place the rectangles; serves every mask and token layout."""
    whole = Span(0, problem.seq_length)
    return Placement(
        [
            placed
            for worker in range(problem.size)
            for placed in share(problem, whole, whole, worker, problem.size)
        ]
    )


def share(problem: Problem, q: Span, kv: Span, worker: int, workers: int) -> Iterator[Placed]:
    """A worker's part of a rectangle: `1/workers` of its work, in as few heads as can be.

    In two steps where whole heads allow it, so that the second half of the heads moves while the
    first is computed; `rank` of what is yielded is `worker`.
    """
    each = Fraction(problem.query_heads, workers)
    begin, end = worker * each, (worker + 1) * each
    halves = 2 if each.denominator == 1 and each.numerator % 2 == 0 else 1
    middle = begin + each / 2
    stages = [(begin, middle), (middle, end)] if halves == 2 else [(begin, end)]
    for step, (first, last) in enumerate(stages):
        for rows, heads in _cut_line(problem, q, kv, first, last):
            yield Placed(step, worker, rows, kv, heads)


def _cut_line(
    problem: Problem, q: Span, kv: Span, begin: Fraction, end: Fraction
) -> Iterator[tuple[Span, Span]]:
    """(queries, heads) of the part of the line of heads from `begin` to `end`."""
    head, stop = begin.__ceil__(), end.__floor__()
    if stop < begin:  # inside one head
        yield _rows(problem, q, kv, begin - stop, end - stop), Span(stop, stop + 1)
        return
    if begin < head:
        yield _rows(problem, q, kv, begin - head + 1, Fraction(1)), Span(head - 1, head)
    for heads in aligned(problem, head, stop):
        yield q, heads
    if stop < end:
        yield _rows(problem, q, kv, Fraction(0), end - stop), Span(stop, stop + 1)


def _rows(problem: Problem, q: Span, kv: Span, begin: Fraction, end: Fraction) -> Span:
    return Span(row(problem, q, kv, begin), row(problem, q, kv, end))


def aligned(problem: Problem, first: int, last: int) -> Iterator[Span]:
    """Cut query heads [first, last) into ranges that a kernel call serves: see `kv_range`."""
    group = problem.group
    if first >= last:
        return
    inner = Span(-(-first // group) * group, last // group * group)  # the whole groups
    if inner.size < 0:
        yield Span(first, last)
        return
    for heads in (Span(first, inner.start), inner, Span(inner.stop, last)):
        if heads.size > 0:
            yield heads


def row(problem: Problem, q: Span, kv: Span, fraction: Fraction) -> int:
    """The query up to which the rectangle holds this fraction of its work."""
    if fraction == 1:
        return q.stop
    goal = fraction * problem.pairs(q, kv)
    low, high = q
    while low < high:
        middle = (low + high) // 2
        if problem.pairs(Span(q.start, middle), kv) < goal:
            low = middle + 1
        else:
            high = middle
    return low
