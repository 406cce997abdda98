# SPDX-License-Identifier: Apache-2.0
"""What a run is planned for: a described cluster, the memory of a rank, the planner's constants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..simulate import Cluster as Machine
from ..simulate.cluster import Figure
from .constants import Basis, Constants


@dataclass(frozen=True)
class Origin:
    """Where a number comes from, and a sentence on it."""

    basis: Basis
    source: str


@dataclass(frozen=True)
class Cluster:
    """A cluster as the planner sees it.

    Attributes:
        machine: its description of configs/clusters: peak, links, attention kernel.
        capacity: bytes of a rank's memory that a process can allocate.
        constants: of the time and memory model, each with its origin in `origins`.
        origins: by constant; one that is not here is a prior.
    """

    machine: Machine
    capacity: Figure
    constants: Constants = field(default_factory=Constants)
    origins: Mapping[str, Origin] = field(default_factory=dict)

    def __hash__(self) -> int:
        return hash((self.machine, self.capacity, self.constants))

    @property
    def name(self) -> str:
        """Of the cluster's file."""
        return self.machine.name

    @property
    def node_size(self) -> int:
        """Ranks of a node."""
        return int(self.machine.ranks_per_node.value)

    @property
    def peak(self) -> float:
        """FLOP/s of a rank in bfloat16."""
        return self.machine.peak("bfloat16")

    def origin(self, name: str) -> Origin:
        """Where a constant comes from."""
        return self.origins.get(name, Origin(Basis.ASSUMED, "prior"))

    def ring(self, local: int, share: float) -> float:
        """Bytes/s through each rank of a ring over several nodes with `local` ranks in each.

        The ring enters a node once, and all the node's ranks together use its adapters, so a ring
        with half of a node's ranks has half of them.
        """
        machine = self.machine
        network = machine.adapters.value * machine.inter.line_rate.value
        return min(machine.intra.bandwidth, network * share * local / self.node_size)

    def collective(self, ranks: int, share: float) -> float:
        """Bytes/s through each of `ranks` consecutive ranks in a ring; `share` of the line rate."""
        if ranks <= self.node_size:
            return self.machine.intra.line_rate.value * share
        return self.ring(self.node_size, self.network_share())

    def point_to_point(self, span: int) -> float:
        """Bytes/s of a rank to another when all ranks send within groups of `span` ranks."""
        machine = self.machine
        if span <= self.node_size:
            return machine.intra.bandwidth
        return machine.inter.bandwidth * min(1.0, machine.adapters.value / self.node_size)

    def latency(self, span: int) -> float:
        """Seconds until the first byte arrives within a group of `span` consecutive ranks."""
        machine = self.machine
        link = machine.intra if span <= self.node_size else machine.inter
        return link.latency.value

    def network_share(self) -> float:
        """Share of the network's line rate that messages reach."""
        return self.machine.inter.share.value
