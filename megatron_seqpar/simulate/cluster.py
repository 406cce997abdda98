# SPDX-License-Identifier: Apache-2.0
"""What a cluster can do, in numbers that each say where they come from.

Note: the model
---------------
Ranks are numbered through the nodes: rank r is on node r // ranks_per_node. Every rank has a port
to the other ranks of its node (NVLink, PCIe, shared memory) and one to the network; a node's ranks
share its network adapters. A port carries one message at a time in each direction.

    kernel   launch + flops / (peak x efficiency), and
             efficiency = share / (1 + half_rows / rows + half_keys / keys)

`rows` are the queries of a tile times heads and batch (what a GPU fills its processors with),
`keys` the mean keys that a query sees (how long each processor stays busy). Half the speed is lost
when rows = half_rows or keys = half_keys: small tiles are slow, which is what decides how finely a
schedule may cut. Attention with a diagonal has a curve of its own, since blocks on the diagonal are
computed whole. Kernels published on three generations of GPUs follow this form within a few
percent (docs/simulate.md shows them).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Literal

from ..errors import ClusterError

Direction = Literal["forward", "backward"]


class Basis(StrEnum):
    """Where a number comes from."""

    MEASURED = "measured"  # on such a machine, by this project
    PUBLISHED = "published"  # by the vendor or by others; the source names it
    ASSUMED = "assumed"  # nobody says; the source gives the reasoning


class LinkKind(StrEnum):
    """What joins two ranks."""

    SELF = "self"  # a rank and itself
    MEMORY = "memory"  # the memory of one machine, between processes
    NVSWITCH = "nvswitch"  # NVLink through a switch: every pair at full speed
    NVLINK = "nvlink"  # NVLink from GPU to GPU
    PCIE = "pcie"
    NETWORK = "network"  # between nodes


@dataclass(frozen=True)
class Figure:
    """A number and its source."""

    value: float
    basis: Basis
    source: str


@dataclass(frozen=True)
class Figures:
    """Numbers of one source by dtype name."""

    values: Mapping[str, float]
    basis: Basis
    source: str


@dataclass(frozen=True)
class Curve:
    """Speed of an attention kernel over tile sizes; see the note at the top.

    Attributes:
        launch: seconds of a call, whatever its size.
        share: share of the peak for large tiles, by head dim; between two head dims it is on a
            line, outside them the nearest.
        half_rows, half_keys: rows and mean keys at which half of that is lost.
    """

    launch: Figure
    share: Mapping[int, Figure]
    half_rows: Figure
    half_keys: Figure

    def efficiency(self, rows: float, keys: float, head_dim: int) -> float:
        """Share of the device's peak that a tile reaches while it runs."""
        loss = 1 + self.half_rows.value / rows + self.half_keys.value / keys
        return self.share_at(head_dim) / loss

    def share_at(self, head_dim: int) -> float:
        """Share of the peak for large tiles of a head dim."""
        left = max((dim for dim in self.share if dim <= head_dim), default=min(self.share))
        right = min((dim for dim in self.share if dim >= head_dim), default=max(self.share))
        low, high = self.share[left].value, self.share[right].value
        return low if left == right else low + (high - low) * (head_dim - left) / (right - left)


@dataclass(frozen=True)
class Kernel:
    """The attention kernel: full tiles, and tiles cut by a diagonal or a band, in both passes."""

    forward_full: Curve
    forward_band: Curve
    backward_full: Curve
    backward_band: Curve

    def curve(self, direction: Direction, full: bool) -> Curve:
        """The curve of a pass and a kind of tile."""
        if direction == "forward":
            return self.forward_full if full else self.forward_band
        return self.backward_full if full else self.backward_band


@dataclass(frozen=True)
class Device:
    """What one rank computes with.

    Attributes:
        name: for people.
        peak: FLOP/s of dense matrix products, by dtype name.
        memory: bytes/s of its memory, for merges and copies.
        small_kernel: seconds of one element-wise operation on little data.
        models: parts of the names that NVML gives such GPUs; empty for a CPU.
    """

    name: str
    peak: Figures
    memory: Figure
    small_kernel: Figure
    models: tuple[str, ...] = ()


@dataclass(frozen=True)
class Link:
    """What joins two ranks.

    Attributes:
        kind: by what.
        line_rate: bytes/s in one direction, as the vendor states it.
        share: the share of it that messages reach.
        latency: seconds from the moment both ends are ready until the first byte is there.
    """

    kind: LinkKind
    line_rate: Figure
    share: Figure
    latency: Figure

    @property
    def bandwidth(self) -> float:
        """Bytes/s of a long message, in one direction."""
        return self.line_rate.value * self.share.value


@dataclass(frozen=True)
class Cluster:
    """A cluster of equal nodes.

    Attributes:
        name: of its file.
        ranks_per_node: ranks that share a node. A count, kept as a figure like all numbers.
        device, kernel: of a rank.
        intra, inter: links within a node and between nodes; `inter` is one network adapter's.
        adapters: network adapters that the ranks of a node share.
        message_overhead: seconds that posting one message costs a rank.
        duplex: sends and receives of a rank do not slow each other down.
        one_port: a rank reaches its node and the network through one port (PCIe).
        overlap_tax: seconds of computing lost for each second of a transfer of the same rank: 0
            when a copy engine or a NIC does the work, 1 when the computing core does.
        note: why this cluster was taken, when it was not named.
        nodes: how many nodes there are, where that was said (`dgx-h100-x4`).
    """

    name: str
    ranks_per_node: Figure
    device: Device
    kernel: Kernel
    intra: Link
    inter: Link
    adapters: Figure
    message_overhead: Figure
    duplex: bool
    one_port: bool
    overlap_tax: Figure
    note: str = ""
    nodes: int | None = None

    def __hash__(self) -> int:
        # its mappings cannot be hashed; equality compares them
        return hash((self.name, self.ranks_per_node, self.intra, self.inter, self.adapters))

    def node(self, rank: int) -> int:
        """The node of a rank."""
        return rank // int(self.ranks_per_node.value)

    def check_holds(self, ranks: int, asked: str) -> None:
        """Raise `ClusterError` for more ranks than the nodes hold, where their number was said.

        asked: what asks for the ranks, as the user typed it.
        """
        if self.nodes is None:
            return
        each = int(self.ranks_per_node.value)
        if ranks > self.nodes * each:
            raise ClusterError(
                f"{asked}: cluster {self.name} was asked for with {self.nodes} nodes of {each} "
                f"ranks, {self.nodes * each} in all; name it {self.name}-x{-(-ranks // each)}"
            )

    def link(self, src: int, dst: int) -> Link | None:
        """What joins two ranks; None for a rank and itself."""
        if src == dst:
            return None
        return self.intra if self.node(src) == self.node(dst) else self.inter

    def peak(self, dtype: object) -> float:
        """FLOP/s at a dtype (a torch dtype or its name); `ClusterError` when it gives none."""
        name = dtype_name(dtype)
        if name not in self.device.peak.values:
            known = ", ".join(self.device.peak.values)
            raise ClusterError(
                f"cluster {self.name}: device.peak_tflops says nothing of dtype={name}; "
                f"it has {known}"
            )
        return self.device.peak.values[name]

    def with_ranks_per_node(self, ranks: int, groups: int = 1) -> Cluster:
        """The cluster as a group sees it that has `ranks` ranks on each node.

        `groups` groups of every node talk at the same time (tensor parallelism makes as many as
        its size) and share the network adapters evenly.
        """
        if ranks < 1 or groups < 1:
            raise ClusterError(
                f"cluster {self.name}: ranks per node = {ranks} and groups = {groups} must be >= 1"
            )
        share = self.adapters.value / groups
        adapters = math.ceil(share)
        rate = self.inter.line_rate
        shared = "" if groups == 1 else f"; {groups} groups of a node share the adapters"
        return replace(
            self,
            ranks_per_node=replace(self.ranks_per_node, value=float(ranks)),
            adapters=replace(self.adapters, value=float(adapters)),
            inter=replace(
                self.inter,
                line_rate=Figure(rate.value * share / adapters, rate.basis, rate.source + shared),
            ),
        )


def dtype_name(dtype: object) -> str:
    """The plain name of a dtype: "bfloat16" for torch.bfloat16 and for "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def link_matrix(cluster: Cluster, size: int) -> list[list[LinkKind]]:
    """What joins each pair of `size` ranks: `matrix[src][dst]`."""
    links = [[cluster.link(src, dst) for dst in range(size)] for src in range(size)]
    return [[LinkKind.SELF if link is None else link.kind for link in row] for row in links]
