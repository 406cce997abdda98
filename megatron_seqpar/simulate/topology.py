# SPDX-License-Identifier: Apache-2.0
"""The cluster this process runs on, as far as NVML tells: its GPUs and what joins them.

NVML is asked through the package `nvidia-ml-py`, an extra (`pip install 'megatron_seqpar[gpu]'`).
It needs no CUDA context and no torch. What it cannot know, the network, is taken from the nearest
cluster of configs/clusters; `Cluster.note` says what was found and what was taken.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import ClusterError
from .cluster import Cluster, LinkKind
from .cluster_file import cluster_names, load_cluster

CPU_CLUSTER = "laptop"
"""The cluster taken where there is no GPU."""

_PCIE_CLUSTER = "pcie-box"


@dataclass(frozen=True)
class Topology:
    """The GPUs of this machine that this process may use.

    Attributes:
        models: NVML's names of them; empty when none was found.
        links: what joins each pair, `links[i][j]`.
        why_none: why there are none, for people; empty otherwise.
    """

    models: tuple[str, ...]
    links: tuple[tuple[LinkKind, ...], ...]
    why_none: str = ""

    @property
    def joined_by(self) -> LinkKind | None:
        """The slowest kind of link between two of the GPUs; None for fewer than two."""
        kinds = {kind for row in self.links for kind in row} - {LinkKind.SELF}
        slowest_first = (LinkKind.PCIE, LinkKind.NVLINK, LinkKind.NVSWITCH)
        return next((kind for kind in slowest_first if kind in kinds), None)


def detect(nvml: Any = None, environ: Mapping[str, str] | None = None) -> Topology:
    """Ask NVML for the GPUs of this machine.

    Args:
        nvml: the module `pynvml`, imported when not given.
        environ: read for CUDA_VISIBLE_DEVICES; os.environ when not given.
    """
    if nvml is None:
        try:
            nvml = import_module("pynvml")
        except ImportError:
            return _none("nvidia-ml-py is not installed (pip install 'megatron_seqpar[gpu]')")
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as failure:
        return _none(f"NVML found no driver: {failure}")
    try:
        handles = _visible(nvml, os.environ if environ is None else environ)
        if not handles:
            return _none("NVML found no GPU that CUDA_VISIBLE_DEVICES lets this process use")
        models = tuple(_text(nvml.nvmlDeviceGetName(handle)) for handle in handles)
        links = tuple(
            tuple(
                LinkKind.SELF if a == b else _link(nvml, handles[a], handles[b])
                for b in range(len(handles))
            )
            for a in range(len(handles))
        )
        return Topology(models, links)
    except nvml.NVMLError as failure:
        return _none(f"NVML does not answer: {failure}")
    finally:
        nvml.nvmlShutdown()


def _none(why: str) -> Topology:
    return Topology((), (), why)


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name


def _visible(nvml: Any, environ: Mapping[str, str]) -> list[Any]:
    """Handles of the GPUs of CUDA_VISIBLE_DEVICES, which NVML itself does not heed.

    As CUDA does, the list ends at its first entry that names no GPU.
    """
    count = nvml.nvmlDeviceGetCount()
    listed = environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
    handles = []
    for entry in (part.strip() for part in listed.split(",")):
        if entry.isdecimal() and int(entry) < count:
            handles.append(nvml.nvmlDeviceGetHandleByIndex(int(entry)))
        elif entry.startswith("GPU-"):
            try:
                handles.append(nvml.nvmlDeviceGetHandleByUUID(entry))
            except nvml.NVMLError:
                break
        else:
            break
    return handles


def _link(nvml: Any, one: Any, other: Any) -> LinkKind:
    """What joins two GPUs of this machine."""
    try:
        status = nvml.nvmlDeviceGetP2PStatus(one, other, nvml.NVML_P2P_CAPS_INDEX_NVLINK)
    except nvml.NVMLError:  # GPUs without NVLink answer "not supported"
        return LinkKind.PCIE
    if status != nvml.NVML_P2P_STATUS_OK:
        return LinkKind.PCIE
    return LinkKind.NVSWITCH if _has_switch(nvml, one) else LinkKind.NVLINK


def _has_switch(nvml: Any, handle: Any) -> bool:
    """Whether an active NVLink of the GPU ends in a switch."""
    for link in range(nvml.NVML_NVLINK_MAX_LINKS):
        try:
            active = nvml.nvmlDeviceGetNvLinkState(handle, link) == nvml.NVML_FEATURE_ENABLED
            if active and (
                nvml.nvmlDeviceGetNvLinkRemoteDeviceType(handle, link)
                == nvml.NVML_NVLINK_DEVICE_TYPE_SWITCH
            ):
                return True
        except nvml.NVMLError:  # links that this GPU does not have
            continue
    return False


def nearest_cluster(topology: Topology) -> Cluster:
    """The known cluster that is most like the GPUs found, with a note that says what was taken.

    GPUs of a known model take its cluster. GPUs joined by PCIe take that of PCIe servers, with the
    device and the kernel of their own model where that is known.
    """
    if not topology.models:
        cluster = load_cluster(CPU_CLUSTER)
        return replace(cluster, note=f"{topology.why_none}: took cluster {CPU_CLUSTER}")
    model, joined = topology.models[0], topology.joined_by
    count = len(topology.models)
    how = f", joined by {joined.value}" if joined is not None else ""
    found = f"found {count} x {model}{how}"
    known = _of_model(model)
    box = load_cluster(_PCIE_CLUSTER)
    if known is None:
        return replace(box, note=f"{found}, of no known cluster: took {box.name}")
    if joined is LinkKind.PCIE and known.intra.kind is not LinkKind.PCIE:
        mixed = replace(box, device=known.device, kernel=known.kernel)
        note = f"{found}: took the links of {box.name} and the device of {known.name}"
        return replace(mixed, note=note)
    return replace(known, note=f"{found}: took cluster {known.name}, its network included")


def _of_model(model: str) -> Cluster | None:
    """The cluster whose GPUs have this name; the longest match, then the fastest network."""
    matches = [
        (len(part), cluster.inter.bandwidth * cluster.adapters.value, cluster)
        for cluster in map(load_cluster, cluster_names())
        for part in cluster.device.models
        if part in model
    ]
    return max(matches, key=lambda match: match[:2])[2] if matches else None


def cluster_for(
    name_or_path: str | Path | None = None,
    *,
    ranks_per_node: int | None = None,
    nvml: Any = None,
    environ: Mapping[str, str] | None = None,
) -> Cluster:
    """The cluster to reckon with.

    Args:
        name_or_path: a name in configs/clusters, the path of a YAML file, or None to look at this
            machine.
        ranks_per_node: ranks that share a node; None takes what the description says, and of this
            machine LOCAL_WORLD_SIZE, which torchrun sets, or else the number of its GPUs.
        nvml, environ: as for `detect`.

    Raises:
        ClusterError: no such cluster, a field of it is wrong, or LOCAL_WORLD_SIZE is no number.
    """
    environ = os.environ if environ is None else environ
    if name_or_path is not None:
        cluster = load_cluster(name_or_path)
    else:
        topology = detect(nvml, environ)
        cluster = nearest_cluster(topology)
        if topology.models:
            cluster = cluster.with_ranks_per_node(len(topology.models))
        ranks_per_node = ranks_per_node or _local_world_size(environ)
    return cluster if ranks_per_node is None else cluster.with_ranks_per_node(ranks_per_node)


def _local_world_size(environ: Mapping[str, str]) -> int | None:
    text = environ.get("LOCAL_WORLD_SIZE")
    if text is None:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ClusterError(f"LOCAL_WORLD_SIZE={text}: give a whole number >= 1, as torchrun does")
    return int(text)
