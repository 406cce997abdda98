# SPDX-License-Identifier: Apache-2.0
"""Move work from overloaded ranks to others, at the least bytes for a unit of work.

A move takes blocks that share an operand (the rows of one piece, or its columns) from one rank to
another. What is shared has to be fetched once for all of them, so a wide move is cheap:

    cut the shared operand        some rows of several blocks: the new rank fetches these rows
                                  and what it lacks of the keys; the old one keeps the keys
    share all of it               all rows of some blocks, the last of them cut at a column: the
                                  old rank no longer needs the keys that left

and the same with rows and columns exchanged. Which blocks, how many and whither: the move of the
least cost per pair moved wins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from typing import NamedTuple

from .assignment import Assignment
from .blocks import KV, Block, Q, most, work

GRAIN = 1000  # differences below one part in so many of a rank's work are let be
SHIFT = 20  # costs per pair are compared as integers, the same on every machine
CRUMB = 64  # query rows whose bytes a move must be worth: fewer and larger moves, fewer kernels


class _Cut(Enum):
    NONE = "none"
    SHARED = "shared"  # all blocks, at one row (or column) of the operand that they share
    OTHER = "other"  # the last block, along its other operand


class _Offer(NamedTuple):
    """Blocks that a rank could take over."""

    cost: int
    pairs: int  # work that the old rank wants to be rid of; more may come with it
    blocks: Sequence[Block]
    taken: int  # the first so many of `blocks`
    cut: _Cut


class _Move(NamedTuple):
    """An offer that is taken."""

    src: int
    dst: int
    axis: int  # of the operand that the blocks share
    offer: _Offer


def balance(state: Assignment, limit: int) -> int:
    """Move work until no rank has more than `limit` pairs, by a thousandth; returns moves made.

    Where no move helps any more a rank keeps what it has: a row of pairs is not cut.
    """
    _quarter_large(state, limit)
    grain = limit // GRAIN
    stuck: set[int] = set()
    moves = 0
    while True:
        over = [r for r in range(state.size) if state.load[r] > limit + grain and r not in stuck]
        if not over:
            return moves
        src = max(over, key=lambda rank: (state.load[rank], rank))
        move = _best(state, src, limit)
        if move is not None and _apply(state, move, limit):
            moves += 1
        else:
            stuck.add(src)


def _quarter_large(state: Assignment, limit: int) -> None:
    """Cut up local blocks of ranks that must give some away: a square moves less than a triangle.

    Halving rows and columns of a causal square leaves two triangles and one full square.
    """
    for rank in range(state.size):
        while True:
            local = [block for block in state.blocks(rank) if state.is_local(rank, block)]
            if work(local) <= limit:
                break
            large = max(local, key=lambda block: (block.pairs, block.spans))
            if large.pairs * 4 < limit or min(span.size for span in large.spans) < 2:
                break
            row, column = ((span.start + span.stop) // 2 for span in large.spans)
            halves = [
                half
                for rows in ((large.spans[Q].start, row), (row, large.spans[Q].stop))
                if (half := large.part(Q, *rows)) is not None
            ]
            ends = (large.spans[KV].start, column), (column, large.spans[KV].stop)
            parts = [half.part(KV, *columns) for half in halves for columns in ends]
            state.replace(rank, large, [(part, rank) for part in parts])


def _best(state: Assignment, src: int, limit: int) -> _Move | None:
    best: _Move | None = None
    cost, pairs = 0, 0
    over = state.load[src] - limit
    rooms = [
        (limit - load, rank)
        for rank, load in enumerate(state.load)
        if limit - load > limit // GRAIN
    ]
    for axis in (Q, KV):
        for piece, spans in state.held[axis][src].items():
            for span, blocks in spans.items():
                saved = [
                    _other(state.exclusive_cost, block, 1 - axis, src)
                    if _alone(state, block, 1 - axis, src)
                    else 0
                    for block in blocks
                ]
                shared_saved = state.exclusive_cost(axis, piece, span, src)
                for room, dst in rooms:
                    shared = state.fetch_cost(axis, piece, span, dst)
                    costs = [_other(state.fetch_cost, block, 1 - axis, dst) for block in blocks]
                    for offer in _offers(
                        blocks, costs, saved, shared, shared_saved, min(over, room), room
                    ):
                        new = offer.cost + CRUMB * state.token_cost[Q]
                        if best is None or new * pairs < cost * offer.pairs:
                            best = _Move(src, dst, axis, offer)
                            cost, pairs = new, offer.pairs
    return best


def _other(cost: Callable[..., int], block: Block, axis: int, rank: int) -> int:
    return cost(axis, block.pieces[axis], block.spans[axis], rank)


def _alone(state: Assignment, block: Block, axis: int, rank: int) -> bool:
    return len(state.held[axis][rank][block.pieces[axis]][block.spans[axis]]) == 1


def _offers(
    blocks: Sequence[Block],
    costs: Sequence[int],
    saved: Sequence[int],
    shared: int,
    shared_saved: int,
    want: int,
    room: int,
) -> Iterator[_Offer]:
    """What a rank could take of blocks that share an operand.

    Args:
        blocks: the blocks of one rank that share the operand.
        costs: what the new rank must fetch of each block's other operand.
        saved: what the old rank need not fetch any more when the block leaves.
        shared, shared_saved: the same for the shared operand.
        want: pairs that are to leave the old rank.
        room: pairs that the new rank can take.
    """
    count = len(blocks)
    order = list(range(count))
    if count > 1:
        order.sort(key=lambda at: (costs[at] << SHIFT) // blocks[at].pairs)
    ordered = [blocks[at] for at in order]
    cost = pairs = 0
    for taken, at in enumerate(order, 1):
        cost += costs[at]
        pairs += blocks[at].pairs
        if pairs > want:
            of_shared = shared - shared_saved if taken == count else shared
            yield _Offer(cost + of_shared * want // pairs, want, ordered, taken, _Cut.SHARED)
    if count > 1:
        order.sort(key=lambda at: ((costs[at] - saved[at]) << SHIFT) // blocks[at].pairs)
        ordered = [blocks[at] for at in order]
    cost, pairs = shared, 0
    for taken, at in enumerate(order, 1):
        more, net = blocks[at].pairs, costs[at] - saved[at]
        if pairs + more > want:
            part = cost + net * (want - pairs) // more
            yield _Offer(part, want, ordered, taken, _Cut.OTHER)
        if pairs + more > room:
            return
        cost += net
        pairs += more
        of_shared = shared_saved if taken == count else 0
        yield _Offer(cost - of_shared, min(pairs, want), ordered, taken, _Cut.NONE)
        if pairs >= want:
            return


def _apply(state: Assignment, move: _Move, limit: int) -> bool:
    """Make the move, exactly; False if no row or column of it fits."""
    src, dst, _, offer = move
    want = min(state.load[src] - limit, limit - state.load[dst])
    blocks = offer.blocks[: offer.taken]
    if offer.cut is _Cut.SHARED:
        return _move_shared(state, move, blocks, want)
    last = blocks[-1] if offer.cut is _Cut.OTHER else None
    moved = 0
    for block in blocks:
        if block is not last:
            state.replace(src, block, [(block, dst)])
            moved += block.pairs
    if last is None or (want - moved) * GRAIN < want * CRUMB:
        return moved > 0  # the rest is too little to be worth a cut
    return _move_columns(state, move, last, want - moved) or moved > 0


def _move_shared(state: Assignment, move: _Move, blocks: Sequence[Block], want: int) -> bool:
    """Cut the shared span of a group of blocks; some of them move on one side of the cut."""
    src, dst, axis, _ = move
    first, last = blocks[0].spans[axis]
    count = most(
        lambda n: work(block.part(axis, last - n, last) for block in blocks), last - first, want
    )
    at = last - max(count, 1)
    moved = work(block.part(axis, at, last) for block in blocks)
    if state.load[dst] + moved >= state.load[src]:
        return False
    # the blocks that stay are cut as well, so that they still share what they shared
    for block in list(state.held[axis][src][blocks[0].pieces[axis]][blocks[0].spans[axis]]):
        later = dst if block in blocks else src
        parts = (block.part(axis, first, at), src), (block.part(axis, at, last), later)
        state.replace(src, block, parts)
    return True


def _move_columns(state: Assignment, move: _Move, block: Block, want: int) -> bool:
    """Cut a block's other operand, and move the first part."""
    src, dst, axis, _ = move
    first, last = block.spans[1 - axis]
    count = most(lambda n: work([block.part(1 - axis, first, first + n)]), last - first, want)
    at = first + max(count, 1)
    taken = block.part(1 - axis, first, at)
    if taken is None or state.load[dst] + taken.pairs >= state.load[src]:
        return False
    state.replace(src, block, [(taken, dst), (block.part(1 - axis, at, last), src)])
    return True
