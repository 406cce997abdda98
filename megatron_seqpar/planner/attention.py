# SPDX-License-Identifier: Apache-2.0
"""Seconds of one layer's attention on one rank, alone or over the SP axis, from closed forms.

Kernel times are the cluster's curves (`megatron_seqpar.simulate`) times the speed that was fitted
for the kernel. Over the SP axis a schedule is a first step, in which a rank computes what it owns,
and further equal steps whose operands move while the step before computes. So a step takes the
longer of both, and what computing does not hide is exposed. Replaying the schedule itself
(`megatron-seqpar schedule --explain`) says the same in more detail; a test compares both.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..mfu import Model
from ..simulate.cluster import Direction
from ..simulate.costs import attention_flops
from .hardware import Cluster
from .layout import Layout

_PASSES: tuple[Direction, ...] = ("forward", "backward")


@dataclass(frozen=True)
class AttentionTime:
    """Seconds of one pass: in kernels, and waiting for transfers of the SP axis."""

    compute: float
    exposed: float

    def __add__(self, other: AttentionTime) -> AttentionTime:
        return AttentionTime(self.compute + other.compute, self.exposed + other.exposed)


@dataclass(frozen=True)
class _Call:
    """Attention of one layer and micro-batch on one rank of the TP axis."""

    model: Model
    cluster: Cluster
    layout: Layout
    direction: Direction

    @property
    def heads(self) -> float:
        return self.model.query_heads / self.layout.tp

    @property
    def kv_heads(self) -> float:
        return max(1.0, self.model.kv_heads / self.layout.tp)

    def kernel(self, queries: float, keys: float, heads: float, diagonal: bool) -> float:
        """Seconds of one call; `keys` are what a query sees on average."""
        model, machine = self.model, self.cluster.machine
        curve = machine.kernel.curve(self.direction, not diagonal)
        batch = self.layout.micro_batch
        work = batch * queries * keys * heads
        flops = attention_flops(1, 1, model.head_dim, model.value_head_dim, self.direction) * work
        speed = curve.efficiency(batch * queries * heads, keys, model.head_dim)
        constants = self.cluster.constants
        fitted = (
            constants.flash1_speed if self.layout.kernel == "flash1" else constants.flash2_speed
        )
        return curve.launch.value + flops / (self.cluster.peak * speed * fitted)

    def transfer(self, size: float) -> float:
        """Seconds of sending `size` bytes from each rank of the SP axis to others of it.

        Ranks with peers on other nodes send a part of it over the network, whose adapters carry
        that part of all the node's ranks.
        """
        if size == 0:
            return 0.0
        machine, span = self.cluster.machine, self.layout.sp * self.layout.tp
        if span <= self.cluster.node_size:
            return machine.intra.latency.value + size / machine.intra.bandwidth
        across = 1 - self.cluster.node_size / span
        ranks = self.cluster.node_size / machine.adapters.value
        network = size * across * max(1.0, ranks) / machine.inter.bandwidth
        return machine.inter.latency.value + max(
            network, size * (1 - across) / machine.intra.bandwidth
        )

    @property
    def unit(self) -> float:
        """Bytes of one head of one chunk."""
        return 2 * self.layout.tokens * (self.model.head_dim + self.model.value_head_dim) / 2


def mean_keys(model: Model, length: float) -> float:
    """Keys that a query sees under a causal mask, mean over queries and layers."""
    whole = (length + 1) / 2
    if model.window is None or model.window.size >= length:
        return whole
    share = model.window.layers(model.layers) / model.layers
    size = model.window.size
    return (1 - share) * whole + share * (size - size * (size - 1) / (2 * length))


def attention_time(
    model: Model, cluster: Cluster, layout: Layout, direction: Direction
) -> AttentionTime:
    """One layer and micro-batch, one pass."""
    if layout.kernel in ("torch", "fused"):
        return AttentionTime(_unfused(model, cluster, layout, direction), 0.0)
    call = _Call(model, cluster, layout, direction)
    if layout.sp == 1:
        length = float(layout.sequence_length)
        return AttentionTime(call.kernel(length, mean_keys(model, length), call.heads, True), 0.0)
    return _SCHEDULES[layout.schedule](call)


def _unfused(model: Model, cluster: Cluster, layout: Layout, direction: Direction) -> float:
    """Products of all scores, masked ones too, and the traffic of the softmax between them."""
    length = layout.sequence_length
    scores = layout.micro_batch * length * length * model.query_heads / layout.tp
    flops = 2 * scores * (model.head_dim + model.value_head_dim)
    constants = cluster.constants
    traffic = constants.torch_traffic if layout.kernel == "torch" else constants.fused_traffic
    products = flops / (cluster.peak * constants.gemm_share)
    # an inner dimension of one head's width halves the speed of a product about
    products *= 1 + constants.gemm_half * (1 / model.head_dim + 2 / length)
    share = 0.4 if direction == "forward" else 0.6
    times = 1 if direction == "forward" else 2
    return products * times + share * traffic * scores / cluster.machine.device.memory.value


def _balanced(call: _Call) -> AttentionTime:
    """Half a tile on the diagonal, then (P - 1) / 2 whole tiles by KV- or Q-route."""
    size = call.layout.sp
    chunk = call.layout.sequence_length / size
    first = call.kernel(chunk, chunk / 2, call.heads, True)
    tile = call.kernel(chunk, chunk, call.heads, False)
    steps = (size - 1) / 2
    # three of four tiles move keys and values, one moves queries and returns a result
    if call.direction == "forward":
        sent = (0.75 * 2 * call.kv_heads + 0.25 * 2 * call.heads) * call.unit
    else:
        sent = (0.75 * 6 * call.kv_heads + 0.25 * 4 * call.heads) * call.unit
    # the busiest port carries a third more than the mean one
    return _stepwise(call, first, tile, steps, 1.33 * sent)


def _published(call: _Call) -> AttentionTime:
    """`balanced` as DISTFLASHATTN has it: of an even number of ranks half idle in the last step."""
    size = call.layout.sp
    chunk = call.layout.sequence_length / size
    tile = call.kernel(chunk, chunk, call.heads, False)
    ours = _balanced(call)
    return AttentionTime(ours.compute + (tile / 2 if size % 2 == 0 else 0.0), ours.exposed)


def _zigzag(call: _Call) -> AttentionTime:
    """An early and a late half chunk a rank: P - 1 steps of half a tile after the own ones."""
    size = call.layout.sp
    chunk = call.layout.sequence_length / size
    first = 2 * call.kernel(chunk / 2, chunk / 4, call.heads, True)
    first += call.kernel(chunk / 2, chunk / 2, call.heads, False)
    tile = call.kernel(chunk, chunk / 2, call.heads, False)
    each = 2 if call.direction == "forward" else 6
    moved = 0.75 * each * call.kv_heads * call.unit
    permute = 0.5 * (4 if call.direction == "forward" else 6) * call.heads * call.unit
    time = _stepwise(call, first, tile, size - 1, moved)
    return time + AttentionTime(0.0, call.transfer(permute))


def _ring(call: _Call) -> AttentionTime:
    """Keys and values go round; the last rank computes a whole tile in every step."""
    size = call.layout.sp
    chunk = call.layout.sequence_length / size
    first = call.kernel(chunk, chunk / 2, call.heads, True)
    tile = call.kernel(chunk, chunk, call.heads, False)
    each = 2 if call.direction == "forward" else 6
    return _stepwise(call, first, tile, size - 1, each * call.kv_heads * call.unit)


def _allgather(call: _Call) -> AttentionTime:
    """Everything comes first; the last rank sees all keys."""
    size, length = call.layout.sp, float(call.layout.sequence_length)
    chunk = length / size
    each = 2 if call.direction == "forward" else 6
    sent = (size - 1) * each * call.kv_heads * call.unit
    compute = call.kernel(chunk, length - chunk / 2, call.heads, True)
    own = call.kernel(chunk, chunk / 2, call.heads, True)
    return AttentionTime(compute, max(0.0, call.transfer(sent) - own))


def _ulysses(call: _Call) -> AttentionTime:
    """Heads in place of tokens: an exchange, attention over some heads, an exchange."""
    size, length = call.layout.sp, float(call.layout.sequence_length)
    heads = call.heads / size
    share = (size - 1) / size
    # KV heads fewer than ranks go to each rank that needs them
    kv = max(call.kv_heads / size, min(1.0, call.kv_heads))
    moved = (2 * heads + 2 * kv) if call.direction == "forward" else (5 * heads + 6 * kv)
    compute = call.kernel(length, mean_keys(call.model, length), heads, True)
    return AttentionTime(compute, 2 * call.transfer(share * moved * call.unit * size / size / 2))


def _stepwise(call: _Call, first: float, tile: float, steps: float, sent: float) -> AttentionTime:
    """`steps` tiles after the first, each of whose operands move in the step before."""
    move = call.transfer(sent)
    slowed = 1 + call.cluster.machine.overlap_tax.value
    compute = first + steps * tile
    if not steps:
        return AttentionTime(compute, 0.0)
    waits = max(0.0, move - first) + (steps - 1) * max(0.0, move - tile)
    if call.direction == "backward":
        waits += call.transfer(sent / 3)  # the last gradients return after the last tile
    hidden = steps * move - waits
    return AttentionTime(compute, max(0.0, waits) + (slowed - 1) * max(0.0, hidden))


_SCHEDULES = {
    "balanced": _balanced,
    "distflashattn": _published,
    "zigzag": _zigzag,
    "ring": _ring,
    "allgather": _allgather,
    "ulysses": _ulysses,
}
