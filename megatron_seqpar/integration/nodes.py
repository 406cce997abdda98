# SPDX-License-Identifier: Apache-2.0
"""What the axis runs on: which of its ranks share a node, and the cluster that `auto` reckons with.

Tensor parallelism lies inside the axis: neighbours on the axis are TP global ranks apart, so of 8
processes a node with TP=2 four belong to one axis, whatever its size.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from megatron_seqpar.config import SeqParConfig, as_typed
from megatron_seqpar.errors import ClusterError
from megatron_seqpar.simulate import Cluster
from megatron_seqpar.simulate.topology import cluster_for


def processes_per_node() -> int | None:
    """What torchrun says, None when something else started the processes."""
    told = os.environ.get("LOCAL_WORLD_SIZE")
    return int(told) if told else None


def node_size(global_ranks: Sequence[int], per_node: int | None) -> int:
    """The largest n that divides the axis so that n consecutive ranks always share a node.

    global_ranks: of the axis, in its order. per_node: processes on each node; None for one node.
    """
    size = len(global_ranks)
    if per_node is None:
        return size
    nodes = [rank // per_node for rank in global_ranks]
    for ranks in range(size, 1, -1):
        groups = (nodes[start : start + ranks] for start in range(0, size, ranks))
        if size % ranks == 0 and all(len(set(group)) == 1 for group in groups):
            return ranks
    return 1


def of_axis(global_ranks: Sequence[int], config: SeqParConfig) -> int:
    """The node size of an axis: as the user says, else as its ranks lie."""
    if config.node_size is not None:
        return config.node_size
    return node_size(global_ranks, processes_per_node())


def cluster_of(config: SeqParConfig, node_size: int) -> Cluster:
    """The cluster as one axis sees it: named by the user, else the nearest to this machine.

    All axes of a node talk at the same time, so they share its network adapters. Ranks of one axis
    must reckon with one cluster: only one of them may look at its machine.

    Raises `ClusterError` when there is no such cluster.
    """
    try:
        cluster = cluster_for(config.cluster)
    except ClusterError as error:
        if config.cluster is None:
            raise
        raise ClusterError(f"{as_typed(config, 'cluster')}: {error}") from error
    axes = (processes_per_node() or node_size) // node_size
    return cluster.with_ranks_per_node(node_size, max(1, axes))
