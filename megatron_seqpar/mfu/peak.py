# SPDX-License-Identifier: Apache-2.0
"""The peak of a device: FLOP/s that it could do, and who says so."""

from __future__ import annotations

from dataclasses import dataclass

from ..simulate.cluster_file import cluster_names, load_cluster


@dataclass(frozen=True)
class Peak:
    """`value` in FLOP/s of one device; `basis` is published, measured or given; `source` says more.

    A CPU has no published peak worth the name: there it is what a large matrix product reaches.
    """

    value: float
    basis: str
    source: str


def peak_of(device: str, dtype: str) -> Peak | None:
    """The published dense peak of a GPU by the name torch gives it; None for unknown ones.

    `dtype` is torch's name without its prefix (bfloat16, float16, float32, float64). The numbers
    are those of configs/clusters, whose GPUs are the SXM kinds.
    """
    if any(slower in device for slower in ("PCIe", "PCIE", "NVL")):
        return None
    for name in cluster_names():
        known = load_cluster(name).device
        value = known.peak.values.get(dtype)
        if value is not None and any(part in device for part in known.models):
            return Peak(value, str(known.peak.basis), f"{known.name}: {known.peak.source}")
    return None
