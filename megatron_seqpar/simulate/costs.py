# SPDX-License-Identifier: Apache-2.0
"""Seconds and FLOPs of what a schedule's step does: tiles, merges, transfers.

FLOPs count the matrix products alone, for p interacting (query, key) pairs, h query heads, keys dk
and values dv wide:

    forward   2 p h (dk + dv)        q k^T and p v
    backward  2 p h (3 dk + 2 dv)    q k^T again, dout v^T, p^T dout, ds k, ds^T q

2.5 times the forward when dk == dv. Everything here works on a schedule's parts by their attributes
and knows nothing of tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import ClusterError
from .cluster import Cluster, Direction, dtype_name

if TYPE_CHECKING:
    from ..attention.ir import Problem, Tile, Transfer
    from ..attention.layouts import Span

ITEM_SIZES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
# tensors of a payload, each one message
MESSAGES = {"kv": 2, "q": 1, "q_grad": 3, "out": 2, "dq": 1, "dkv": 2}
RETURNS = frozenset(("out", "dq", "dkv"))
# element-wise operations that merging one arrived result takes
_MERGE_KERNELS = {"out": 6, "dq": 1, "dkv": 2}


def item_size(dtype: object) -> int:
    """Bytes per element of a dtype (a torch dtype or its name)."""
    size = ITEM_SIZES.get(dtype_name(dtype))
    if size is None:
        raise ClusterError(f"dtype={dtype}: use one of {', '.join(ITEM_SIZES)}")
    return size


def attention_flops(
    pairs: int, heads: int, head_dim: int, value_dim: int, direction: Direction
) -> int:
    """FLOPs of attention over `pairs` (query, key) pairs of each of `heads` query heads."""
    if direction == "forward":
        return 2 * pairs * heads * (head_dim + value_dim)
    return 2 * pairs * heads * (3 * head_dim + 2 * value_dim)


class Costs:
    """Seconds of the parts of one problem's schedules on one cluster.

    Args:
        problem: sizes of heads.
        cluster: what runs it.
        dtype: of q, k and v: a torch dtype or its name.
        direction: which pass.
        batch: samples; tiles and transfers are of one.
    """

    def __init__(
        self,
        problem: Problem,
        cluster: Cluster,
        dtype: object = "bfloat16",
        direction: Direction = "forward",
        batch: int = 1,
    ) -> None:
        self.problem, self.cluster = problem, cluster
        self.direction: Direction = direction
        self.batch = batch
        self.item = item_size(dtype)
        self._wide = max(4, self.item)  # bytes of an element of a sum
        self._peak = cluster.peak(dtype)
        self._tiles: dict[tuple[int, ...], float] = {}
        self._bytes: dict[tuple[str, int, int], int] = {}

    # ---- tiles --------------------------------------------------------------------------------

    def flops(self, tile: Tile) -> int:
        """FLOPs of one tile, all samples."""
        problem = self.problem
        return self.batch * attention_flops(
            tile.pairs, tile.heads.size, problem.head_dim, problem.value_dim, self.direction
        )

    def tile_seconds(self, tile: Tile) -> float:
        """One kernel call."""
        sizes = (tile.q.size, tile.kv.size, tile.heads.size, tile.pairs)
        known = self._tiles.get(sizes)
        if known is None:
            known = self._tiles[sizes] = self._kernel_seconds(tile)
        return known

    def _kernel_seconds(self, tile: Tile) -> float:
        queries = tile.q.size
        full = tile.pairs == queries * tile.kv.size
        curve = self.cluster.kernel.curve(self.direction, full)
        rows, keys = queries * tile.heads.size * self.batch, tile.pairs / queries
        efficiency = curve.efficiency(rows, keys, self.problem.head_dim)
        return curve.launch.value + self.flops(tile) / (self._peak * efficiency)

    def results(self, tile: Tile) -> tuple[tuple[tuple[object, ...], float], ...]:
        """The sums that a tile's partial results go to, and the seconds of adding each.

        The first partial of a sum is kept as it came and costs nothing.
        """
        queries = ("q", tile.q, tile.heads)
        if self.direction == "forward":
            return ((queries, self._merge("out", tile.q.size, tile.heads.size)),)
        kv_heads = self.kv_heads(tile)
        return (
            (queries, self._merge("dq", tile.q.size, tile.heads.size)),
            (("kv", tile.kv, kv_heads), self._merge("dkv", tile.kv.size, kv_heads.size)),
        )

    def kv_heads(self, tile: Tile) -> Span:
        """KV heads that a tile's query heads need."""
        return self.problem.kv_range(tile.heads)

    # ---- transfers ----------------------------------------------------------------------------

    def bytes(self, transfer: Transfer) -> int:
        """Bytes of a transfer, all samples."""
        sizes = (transfer.payload.value, transfer.span.size, transfer.heads.size)
        known = self._bytes.get(sizes)
        if known is None:
            known = self.batch * self.problem.transfer_bytes(transfer, self.item)
            self._bytes[sizes] = known
        return known

    def transfer_seconds(self, transfer: Transfer) -> float:
        """One transfer alone on its links, from both ends being ready to its arrival."""
        return transfer_seconds(self.bytes(transfer), transfer.src, transfer.dst, self.cluster)

    def post_seconds(self, transfer: Transfer) -> float:
        """What posting a transfer costs the sender: its messages, and rounding a sum to `dtype`."""
        payload = transfer.payload.value
        seconds = MESSAGES[payload] * self.cluster.message_overhead.value
        if payload in RETURNS and self._wide != self.item:
            numbers = self.batch * transfer.span.size * transfer.heads.size * self._width(payload)
            seconds += self._elementwise(1, numbers * (self._wide + self.item))
        return seconds

    def receive_seconds(self, transfer: Transfer) -> float:
        """What posting a transfer costs the receiver."""
        return MESSAGES[transfer.payload.value] * self.cluster.message_overhead.value

    def merge_seconds(self, transfer: Transfer) -> float:
        """Merging a result that arrived; 0 for operands."""
        payload = transfer.payload.value
        if payload not in RETURNS:
            return 0.0
        return self._merge(payload, transfer.span.size, transfer.heads.size)

    # ---- memory -------------------------------------------------------------------------------

    def _width(self, payload: str) -> int:
        problem = self.problem
        return {
            "out": problem.value_dim,
            "dq": problem.head_dim,
            "dkv": problem.head_dim + problem.value_dim,
        }[payload]

    def _merge(self, payload: str, tokens: int, heads: int) -> float:
        """Read a partial, read and write the wide sum; outputs with their log-sum-exp."""
        numbers = self.batch * tokens * heads
        moved = numbers * self._width(payload) * (self.item + 2 * self._wide)
        if payload == "out":
            moved += numbers * 3 * self._wide
        return self._elementwise(_MERGE_KERNELS[payload], moved)

    def _elementwise(self, kernels: int, moved: int) -> float:
        device = self.cluster.device
        return kernels * device.small_kernel.value + moved / device.memory.value


def tile_seconds(
    tile: Tile,
    problem: Problem,
    dtype: object,
    direction: Direction,
    cluster: Cluster,
    batch: int = 1,
) -> float:
    """Seconds of one kernel call; see `Costs`."""
    return Costs(problem, cluster, dtype, direction, batch).tile_seconds(tile)


def transfer_seconds(size: int, src: int, dst: int, cluster: Cluster) -> float:
    """Seconds of a transfer of `size` bytes between two ranks, alone on its links."""
    link = cluster.link(src, dst)
    return 0.0 if link is None else link.latency.value + size / link.bandwidth
