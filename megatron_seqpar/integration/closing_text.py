# SPDX-License-Identifier: Apache-2.0
"""A finished run in a few lines for the terminal, from its report."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

LABEL_WIDTH = 16
PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"))


def summary(report: Mapping[str, Any], path: object = None) -> str:
    """The closing summary; `path` is where the report lies, if it does.

    What was not measured has no line, except MFU, which then says why.
    """
    numbers = report["summary"]
    lines = ["", _headline(report)]
    for label, text in (
        ("loss", _loss(report.get("steps"))),
        ("step", _step(numbers)),
        ("MFU", _utilization(numbers)),
        ("sent", _sent(numbers)),
        ("attention", _attention(numbers)),
        ("peak memory", _memory(report)),
        ("telemetry", _telemetry([rank["telemetry"] for rank in report["ranks"]])),
        ("report", None if path is None else str(path)),
    ):
        if text is not None:
            lines.append(f"  {label:<{LABEL_WIDTH - 1}} {text}")
    return "\n".join(lines)


def percent(share: float) -> str:
    """'41.2%'; of small shares as many digits as say something."""
    digits = 1 if share >= 0.1 else 2 if share >= 0.01 else 3
    return f"{100 * share:.{digits}f}%"


def flops_per_second(value: float) -> str:
    """'989.4 TFLOP/s'."""
    size, letter = next((pair for pair in PREFIXES if value >= pair[0]), PREFIXES[-1])
    return f"{value / size:,.1f} {letter}FLOP/s"


def utilization(mfu: float | None, causal: float | None) -> str | None:
    """'MFU 41.2% (causal 33.0%)', or what of it is known."""
    if mfu is None:
        return None
    return f"MFU {percent(mfu)}" + ("" if causal is None else f" (causal {percent(causal)})")


def _headline(report: Mapping[str, Any]) -> str:
    parallel, model = report["parallel"], report["model"]
    axes = ", ".join(
        f"{name} {parallel[name]}" for name in ("sequence", "tensor", "pipeline", "data")
    )
    length = model["sequence_length"]
    text = f"run of {report['summary']['steps']} steps on {parallel['world']} ranks ({axes}), "
    text += "" if length is None else f"{length:,} tokens a sequence, "
    text += f"{model['dtype']}, {report['device']['name']}"
    missing = parallel["world"] - len(report["ranks"])
    return text + (f"; {missing} ranks did not tell theirs" if missing else "")


def _loss(steps: Any) -> str | None:
    if not steps:
        return None
    first, last = steps[0], steps[-1]
    if first["loss"] is None:
        return "not reported by the script under 'lm loss'"
    return (
        f"{first['loss']:.6f} at step {first['iteration']}, "
        f"{last['loss'] if last['loss'] is not None else math.nan:.6f} at step {last['iteration']}"
    )


def _step(numbers: Mapping[str, Any]) -> str | None:
    if numbers["seconds_per_step"] is None:
        return None
    speed = numbers["tokens_per_second"]
    text = f"{numbers['seconds_per_step']:.3f} s"
    text += "" if speed is None else f", {speed:,.0f} tokens/s"
    return f"{text} (median of {numbers['timed_steps']}{numbers.get('timed_how', '')})"


def _utilization(numbers: Mapping[str, Any]) -> str | None:
    known = utilization(numbers["mfu"], numbers["causal_mfu"])
    if known is None:
        return None if numbers["mfu_note"] is None else f"unknown: {numbers['mfu_note']}"
    peak = flops_per_second(numbers["peak_flops_per_rank"])
    text = f"{known.removeprefix('MFU ')} of {peak} a rank, {numbers['peak_basis']}"
    return text if numbers["mfu_note"] is None else f"{text}; {numbers['mfu_note']}"


def _sent(numbers: Mapping[str, Any]) -> str | None:
    sent = numbers["bytes_sent_per_rank_and_step"]
    return None if sent is None else f"{sent / 2**20:,.2f} MiB a rank and step"


def _attention(numbers: Mapping[str, Any]) -> str | None:
    computed = numbers["attention_compute_seconds_per_step"]
    if not computed:
        return None
    waited = numbers["attention_wait_seconds_per_step"]
    return f"{computed:.3f} s computing, {waited:.3f} s waiting a step"


def _memory(report: Mapping[str, Any]) -> str:
    return (
        f"{report['summary']['peak_memory_bytes'] / 2**20:,.0f} MiB on the fullest rank "
        f"({report['ranks'][0]['memory']})"
    )


_QUANTITIES: dict[str, tuple[float, str]] = {
    "power_watts": (1, "{:,.0f} W"),
    "sm_clock_mhz": (1, "{:,.0f} MHz"),
    "utilization_percent": (1, "{:.0f}% busy"),
    "temperature_celsius": (1, "{:.0f} C"),
    "memory_used_bytes": (2**30, "{:,.1f} GiB used"),
    "nvlink_sent_bytes_per_second": (1e9, "NVLink {:,.1f} GB/s out"),
    "nvlink_received_bytes_per_second": (1e9, "NVLink {:,.1f} GB/s in"),
}
"""Of telemetry: the unit that is shown, and how."""


def _telemetry(ranks: Sequence[Mapping[str, Any]]) -> str:
    """Medians over time and then over ranks, with the largest of all; what is missing, once."""
    whys = dict.fromkeys(str(rank["absent"]) for rank in ranks if "absent" in rank)
    sampled = [rank for rank in ranks if "absent" not in rank]
    if not sampled:
        return f"absent: {'; '.join(whys)}"
    parts = []
    for name, (unit, text) in _QUANTITIES.items():
        known = [rank["quantities"][name] for rank in sampled if name in rank["quantities"]]
        if known:
            median = statistics.median(one["median"] for one in known) / unit
            largest = max(one["max"] for one in known) / unit
            number = text[text.index("{") : text.index("}") + 1].format(largest)
            parts.append(f"{text.format(median)} (max {number})")
    missing: dict[str, list[str]] = {}
    for rank in sampled:
        for name, why in rank["lacking"].items():
            names = missing.setdefault(why, [])
            if name not in names:
                names.append(name)
        for name, failure in rank["failed"].items():
            whys[f"{name} failed {failure['times']} times: {failure['last']}"] = None
        if "ended_by" in rank:
            whys[f"ended early: {rank['ended_by']}"] = None
    notes = [f"without {', '.join(names)}: {why}" for why, names in missing.items()]
    return "; ".join([", ".join(parts) or "no sample", *notes, *whys])
