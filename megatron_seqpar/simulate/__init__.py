# SPDX-License-Identifier: Apache-2.0
"""Schedules on a cluster that need not be there: costs, timelines, traces. Imports no torch.

It works on schedules by their attributes, so it imports nothing of `attention`, which imports this
package for the costs that `auto` compares.

cluster.py       what a cluster can do, in numbers that say where they come from
cluster_file.py  clusters as YAML, by name (configs/clusters) or path
topology.py      the cluster this process runs on, as far as NVML tells
costs.py         seconds and FLOPs of tiles, merges and transfers
replay.py        simulate(): a schedule's pass on a cluster
timeline.py      its outcome: what happens when on every rank
predict.py       predict(): both passes in a few numbers
perfetto.py      a timeline as a trace
plot.py          a timeline as a picture
calibrate.py     a cluster's numbers from measured ones
"""

from .cluster import Cluster, link_matrix
from .cluster_file import cluster_names, load_cluster, save_cluster, split_nodes
from .costs import Costs, attention_flops, tile_seconds, transfer_seconds
from .predict import Prediction, predict
from .replay import simulate
from .timeline import Event, EventKind, Timeline

__all__ = [
    "Cluster",
    "Costs",
    "Event",
    "EventKind",
    "Prediction",
    "Timeline",
    "attention_flops",
    "cluster_names",
    "link_matrix",
    "load_cluster",
    "predict",
    "save_cluster",
    "simulate",
    "split_nodes",
    "tile_seconds",
    "transfer_seconds",
]
