# SPDX-License-Identifier: Apache-2.0
"""The parts of a plan: tiles, transfers, steps, and the problem they solve. No tensors.

Note: the shape of a schedule
-----------------------------
A schedule is, for every rank, a list of steps. One step of one rank:

    post     sends and receives of this step (one grouped call), without waiting
    compute  this step's tiles, from what is local or arrived in an earlier step
    wait     for the posted transfers; merge the partial results that arrived

so what step t+1 computes on is posted at step t and moves while step t computes, and what step t
computed for another rank is returned at step t+1. A step may compute nothing (only move) and a rank
may have nothing to move.

Words: a *tile* is one (query range, key/value range, head range) block of attention. On the
*KV-route* keys and values move to the owner of the queries; on the *Q-route* queries move to the
owner of the keys and values, and the partial output with its log-sum-exp moves back; a tile may
also be computed by a rank that owns neither (both routes). Head ranges count query heads in tiles
and the payload's own heads in transfers.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Literal, NamedTuple

from ..errors import ScheduleError
from .layouts import Span, TokenLayout
from .masks import Mask, Region, RegionIndex, TileKind

Direction = Literal["forward", "backward"]

ITEM_SIZES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


class Payload(StrEnum):
    """What a transfer carries for its token range; the order here is the order within one step."""

    KV = "kv"  # keys and values, to the owner of the queries
    Q = "q"  # queries, to the owner of the keys and values (forward)
    Q_GRAD = "q_grad"  # queries, output gradient, LSE and delta (backward's Q-route)
    OUT = "out"  # partial output and its LSE, back to the owner of the queries (forward)
    DQ = "dq"  # partial query gradient, back to the owner of the queries (backward)
    DKV = "dkv"  # partial key and value gradients, back to their owner (backward)


RETURNS = (Payload.OUT, Payload.DQ, Payload.DKV)
# tensors of a payload, each one point-to-point message: (k, v), (q), (q, dout, [lse, delta]),
# (out, lse), ...
PARTS = {
    Payload.KV: 2,
    Payload.Q: 1,
    Payload.Q_GRAD: 3,
    Payload.OUT: 2,
    Payload.DQ: 1,
    Payload.DKV: 2,
}
_ORDER = {payload: index for index, payload in enumerate(Payload)}


class Route(StrEnum):
    """Where the two operands of a tile come from, seen from the rank that computes it."""

    LOCAL = "local"
    KV = "kv-route"
    Q = "q-route"
    BOTH = "both-route"


@dataclass(frozen=True, slots=True)
class Tile:
    """One block of attention computed in one kernel call.

    Attributes:
        q, kv: global token ranges; they may span several owners.
        heads: query heads.
        low, high: query i sees key j when low <= j - i <= high; None where that cuts nothing off.
        pairs: interacting (query, key) pairs: the tile's work, to be multiplied by query heads.
    """

    q: Span
    kv: Span
    heads: Span
    low: int | None
    high: int | None
    pairs: int

    @property
    def region(self) -> Region:
        """Its pairs."""
        return Region(self.q, self.kv, self.low, self.high)

    @property
    def kind(self) -> TileKind:
        """What the kernel is told: full, causal or a band."""
        return self.region.kind

    @property
    def work(self) -> int:
        """Interacting pairs times query heads."""
        return self.pairs * self.heads.size


@dataclass(frozen=True, slots=True)
class Transfer:
    """One payload of one token range and head range from one rank to another (group ranks)."""

    payload: Payload
    span: Span
    src: int
    dst: int
    heads: Span

    @property
    def key(self) -> Key:
        """What is carried, whoever carries it."""
        return self.payload, self.span, self.heads

    @property
    def order(self) -> tuple[int, Span, Span]:
        """Sorting key: both ends of a pair post the transfers of one step in this order."""
        return _ORDER[self.payload], self.span, self.heads


Key = tuple[Payload, Span, Span]
"""A payload's token range and head range."""


@dataclass(frozen=True, slots=True)
class Step:
    """What one rank does at one step; see the note at the top.

    Attributes:
        tiles: computed in this order.
        sends, receives: posted together before the tiles, waited for after them.
        frees: received operands that no later step needs.
    """

    tiles: tuple[Tile, ...] = ()
    sends: tuple[Transfer, ...] = ()
    receives: tuple[Transfer, ...] = ()
    frees: tuple[Key, ...] = ()


@dataclass(frozen=True)
class Problem:
    """What is to be computed: the token layout, the mask, the sizes of a head, the nodes.

    Attributes:
        layout: which tokens each rank owns.
        mask: which pairs interact.
        query_heads, kv_heads: per rank of the SP axis (after any TP split); query_heads is a
            multiple of kv_heads (GQA); kv_heads == query_heads is MHA, kv_heads == 1 is MQA.
        head_dim: of queries and keys. value_dim: of values and outputs.
        node_size: ranks that share a node's fast links, consecutive group ranks; 1 for "each on
            its own", the size of the axis for "all in one".
    """

    layout: TokenLayout
    mask: Mask
    query_heads: int = 1
    kv_heads: int = 1
    head_dim: int = 128
    value_dim: int = 128
    node_size: int = 1

    def __post_init__(self) -> None:
        if min(self.query_heads, self.kv_heads, self.head_dim, self.value_dim) < 1:
            raise ScheduleError("query_heads, kv_heads, head_dim and value_dim must be >= 1")
        if self.query_heads % self.kv_heads:
            raise ScheduleError(
                f"query_heads={self.query_heads} is not a multiple of kv_heads={self.kv_heads}: "
                "grouped-query attention gives every KV head the same number of query heads"
            )
        if self.node_size < 1 or self.layout.size % self.node_size:
            raise ScheduleError(
                f"node_size={self.node_size} does not divide the {self.layout.size} ranks"
            )

    @property
    def size(self) -> int:
        """Ranks of the SP axis."""
        return self.layout.size

    @property
    def seq_length(self) -> int:
        """Tokens of the whole sequence."""
        return self.layout.seq_length

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.query_heads // self.kv_heads

    @property
    def all_heads(self) -> Span:
        """Every query head."""
        return Span(0, self.query_heads)

    @cached_property
    def index(self) -> RegionIndex:
        """The mask's regions on this sequence."""
        return RegionIndex(self.mask.regions(self.seq_length))

    def pairs(self, q: Span, kv: Span) -> int:
        """Interacting (query, key) pairs of a rectangle."""
        return self.index.pairs(q, kv)

    @cached_property
    def total_work(self) -> int:
        """Interacting pairs of the whole sequence times query heads."""
        return self.query_heads * sum(region.pairs for region in self.index.regions)

    def kv_range(self, heads: Span) -> Span:
        """KV heads that a range of query heads needs.

        Raises `ScheduleError` unless the range lies inside one group or begins and ends with one:
        a kernel call gives every KV head the same number of query heads.
        """
        first, last = heads.start // self.group, (heads.stop - 1) // self.group
        whole = heads.start % self.group == 0 == heads.stop % self.group
        if heads.size < 1 or heads.stop > self.query_heads or not (whole or first == last):
            raise ScheduleError(f"query heads {heads} do not match groups of {self.group}")
        return Span(first, last + 1)

    def route(self, rank: int, tile: Tile) -> Route:
        """The tile's route when `rank` computes it."""
        own_q, own_kv = (self.layout.owns(rank, span) for span in (tile.q, tile.kv))
        if own_q:
            return Route.LOCAL if own_kv else Route.KV
        return Route.Q if own_kv else Route.BOTH

    def payload_bytes(self, payload: Payload, tokens: int, heads: int, item_size: int) -> int:
        """Bytes of a payload for `tokens` tokens and `heads` of its own heads, one sample.

        Statistics are fp32 (fp64 for fp64 inputs).
        """
        stat = 8 if item_size == 8 else 4
        elements, stats = {
            Payload.KV: (self.head_dim + self.value_dim, 0),
            Payload.Q: (self.head_dim, 0),
            Payload.Q_GRAD: (self.head_dim + self.value_dim, 2),
            Payload.OUT: (self.value_dim, 1),
            Payload.DQ: (self.head_dim, 0),
            Payload.DKV: (self.head_dim + self.value_dim, 0),
        }[payload]
        return tokens * heads * (elements * item_size + stats * stat)

    def transfer_bytes(self, transfer: Transfer, item_size: int) -> int:
        """Bytes of one transfer, one sample."""
        return self.payload_bytes(
            transfer.payload, transfer.span.size, transfer.heads.size, item_size
        )


Plan = tuple[tuple[Step, ...], ...]
"""The steps of every rank, `plan[rank][step]`; every rank has the same number of steps."""


class Placed(NamedTuple):
    """A rectangle placed by a builder: which rank computes it at which step.

    What of the mask lies in it becomes tiles; heads None means all query heads.
    """

    step: int
    rank: int
    q: Span
    kv: Span
    heads: Span | None = None


def item_size(dtype: object) -> int:
    """Bytes per element of a dtype given as a torch dtype, a name or a number of bytes."""
    if isinstance(dtype, int):
        return dtype
    size = ITEM_SIZES.get(str(dtype).removeprefix("torch."))
    if size is None:
        raise ScheduleError(f"dtype={dtype}: use one of {', '.join(ITEM_SIZES)}")
    return size
