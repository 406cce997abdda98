# SPDX-License-Identifier: Apache-2.0
"""The peak that the MFU of several runs is a share of."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from ..mfu import Peak, peak_of


def peak_of_rows(rows: Iterable[Mapping[str, Any]], tflops: float | None = None) -> Peak | None:
    """One peak for all rows, so that their MFU can be compared.

    It is the given one (`tflops`), or the one published for the rows' GPU, or, on a CPU, the median
    of what the runs measured. None where no row is ok, or nothing is known.
    """
    if tflops is not None:
        return Peak(tflops * 1e12, "given", "peak-tflops of the comparison's file")
    done = [row for row in rows if row["status"] == "ok"]
    if not done:
        return None
    device = done[0]["device"]
    if device["kind"] == "cuda":
        return peak_of(device["name"], done[0]["dtype"])
    measured = [row["peak_flops_per_rank"] for row in done if row.get("peak_flops_per_rank")]
    if not measured:
        return None
    source = f"median of {len(measured)} runs' own measurement of a large matrix product"
    return Peak(statistics.median(measured), "measured", source)
