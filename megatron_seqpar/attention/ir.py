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

Words: a *tile* is one (query range, key/value range) block of attention. On the *KV-route* keys and
values move to the owner of the queries; on the *Q-route* queries move to the owner of the keys and
values, and the partial output with its log-sum-exp moves back.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from ..errors import ScheduleError
from .layouts import ContiguousLayout, Span
from .masks import Mask, TileKind

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
        q, kv: global token ranges.
        q_owner, kv_owner: ranks that own them.
        kind: what the kernel is told (full or causal).
        pairs: interacting (query, key) pairs: the tile's work, to be multiplied by query heads.
    """

    q: Span
    kv: Span
    q_owner: int
    kv_owner: int
    kind: TileKind
    pairs: int

    def route(self, rank: int) -> Route:
        """The tile's route when `rank` computes it."""
        if self.q_owner == rank:
            return Route.LOCAL if self.kv_owner == rank else Route.KV
        return Route.Q if self.kv_owner == rank else Route.BOTH


@dataclass(frozen=True, slots=True)
class Transfer:
    """One payload of one token range from one rank to another (group ranks)."""

    payload: Payload
    span: Span
    src: int
    dst: int

    @property
    def order(self) -> tuple[int, Span]:
        """Sorting key: both ends of a pair post the transfers of one step in this order."""
        return _ORDER[self.payload], self.span


@dataclass(frozen=True, slots=True)
class Step:
    """What one rank does at one step; see the note at the top.

    Attributes:
        tiles: computed in this order.
        sends, receives: posted together before the tiles, waited for after them.
        frees: (payload, span) of received operands that no later step needs.
    """

    tiles: tuple[Tile, ...] = ()
    sends: tuple[Transfer, ...] = ()
    receives: tuple[Transfer, ...] = ()
    frees: tuple[tuple[Payload, Span], ...] = ()


@dataclass(frozen=True)
class Problem:
    """What is to be computed: the token layout, the mask and the sizes of a head.

    Attributes:
        layout: which tokens each rank owns.
        mask: which pairs interact.
        query_heads, kv_heads: per rank of the SP axis (after any TP split); query_heads is a
            multiple of kv_heads (GQA); kv_heads == query_heads is MHA, kv_heads == 1 is MQA.
        head_dim: of queries and keys. value_dim: of values and outputs.
    """

    layout: ContiguousLayout
    mask: Mask
    query_heads: int = 1
    kv_heads: int = 1
    head_dim: int = 128
    value_dim: int = 128

    def __post_init__(self) -> None:
        if min(self.query_heads, self.kv_heads, self.head_dim, self.value_dim) < 1:
            raise ScheduleError("query_heads, kv_heads, head_dim and value_dim must be >= 1")
        if self.query_heads % self.kv_heads:
            raise ScheduleError(
                f"query_heads={self.query_heads} is not a multiple of kv_heads={self.kv_heads}: "
                "grouped-query attention gives every KV head the same number of query heads"
            )

    def payload_bytes(self, payload: Payload, tokens: int, item_size: int) -> int:
        """Bytes of a payload for `tokens` tokens of one sample; statistics in fp32 (fp64: fp64)."""
        stat = 8 if item_size == 8 else 4
        q, out = self.query_heads * self.head_dim, self.query_heads * self.value_dim
        kv = self.kv_heads * (self.head_dim + self.value_dim)
        elements, stats = {
            Payload.KV: (kv, 0),
            Payload.Q: (q, 0),
            Payload.Q_GRAD: (q + out, 2 * self.query_heads),
            Payload.OUT: (out, self.query_heads),
            Payload.DQ: (q, 0),
            Payload.DKV: (kv, 0),
        }[payload]
        return tokens * (elements * item_size + stats * stat)


Plan = tuple[tuple[Step, ...], ...]
"""The steps of every rank, `plan[rank][step]`; every rank has the same number of steps."""


@dataclass(frozen=True)
class Placed:
    """A tile placed by a builder: which rank computes it at which step."""

    step: int
    rank: int
    q: Span
    kv: Span


def item_size(dtype: object) -> int:
    """Bytes per element of a dtype given as a torch dtype, a name or a number of bytes."""
    if isinstance(dtype, int):
        return dtype
    size = ITEM_SIZES.get(str(dtype).removeprefix("torch."))
    if size is None:
        raise ScheduleError(f"dtype={dtype}: use one of {', '.join(ITEM_SIZES)}")
    return size
