# SPDX-License-Identifier: Apache-2.0
"""Rows of one sequence length to what a reader asks: same losses? how fast? what does it cost?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_seqpar.experiments.numbers import largest_difference
from megatron_seqpar.mfu import Model, Peak, model_flops, utilization


def judge(
    rows: Sequence[Mapping[str, Any]],
    model: Model,
    sequence_length: int,
    sequences: int,
    peak: Peak | None,
) -> list[dict[str, Any]]:
    """The rows with what is compared: MFU, loss difference from the reference, ratio of times.

    The reference of losses is the first row that is ok, on one rank and of the asked model; where
    there is none (a model too large for one), the first that is ok, if there are others. Ratios of
    times are over the fastest way of the same ranks that splits the sequence (SP), where there
    is one: above 1 is slower than SP. MFU counts the asked model's FLOPs, padding not among them.
    """
    reference = _reference(rows)
    sp = [row for row in rows if row["status"] == "ok" and row["layout"]["sp"] > 1]
    base = min(sp, key=lambda row: row["step_time_s"], default=None)
    flops = {
        name: model_flops(model, sequence_length, sequences, causal=causal)
        for name, causal in (("mfu", False), ("causal_mfu", True))
    }
    judged = []
    for row in rows:
        more: dict[str, Any] = {"loss_difference": None, "time_over_sp": None}
        if row["status"] == "ok":
            for name, count in flops.items():
                more[name] = peak and utilization(
                    count, row["step_time_s"], row["ranks"], peak.value
                )
            if reference is not None and not row["changes"]:
                more["loss_difference"] = largest_difference(row["losses"], reference["losses"])
            if base is not None and row["ranks"] == base["ranks"]:
                more["time_over_sp"] = row["step_time_s"] / base["step_time_s"]
        judged.append({**row, **more, "reference": row is reference})
    return judged


def _reference(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The row that losses are compared with."""
    fit = [row for row in rows if row["status"] == "ok" and not row["changes"]]
    alone = next((row for row in fit if row["ranks"] == 1), None)
    return alone or (fit[0] if len(fit) > 1 else None)


def notes(rows: Sequence[Mapping[str, Any]], peak: Peak | None, *extra: str) -> list[str]:
    """What a reader must know to judge the table fairly."""
    said = [row["note"] for row in rows if row["note"]]
    said += [note for note in extra if note]
    done = [row for row in rows if row["status"] == "ok"]
    sizes = {row["ranks"] for row in done}
    if len(sizes) > 1 and done[0]["device"]["kind"] == "cpu":
        said.append(
            f"{done[0]['device']['threads']} thread(s) a rank: more ranks use more cores, as more "
            "GPUs would"
        )
    if peak is None:
        said.append("no MFU: no peak is known; give peak-tflops")
    elif peak.basis != "published":
        said.append(
            f"MFU is of {peak.value / 1e9:,.1f} GFLOP/s a rank ({peak.basis}: {peak.source})"
        )
    if any(row["status"] == "ok" and row["step_time_spread"] > 0.2 for row in rows):
        said.append("steps of some ways differ by more than 20%: the machine is not quiet")
    return list(dict.fromkeys(said))
