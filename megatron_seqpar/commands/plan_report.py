# SPDX-License-Identifier: Apache-2.0
"""What `plan` found, as tables for people and as dictionaries for programs."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_seqpar.planner import Basis, Cluster, Estimate
from megatron_seqpar.planner.constants import Constants, meaning_of, prior_of, unit_of
from megatron_seqpar.planner.fit import Fit
from megatron_seqpar.planner.launch import launch_command
from megatron_seqpar.planner.layout import Layout
from megatron_seqpar.planner.ranking import BAND
from megatron_seqpar.planner.search import Found
from megatron_seqpar.planner.validate import Predicted, Scores, score, score_groups

_GIB = 2**30


def console() -> Console:
    """As wide as the terminal; a pipe wraps nothing."""
    terminal = shutil.get_terminal_size().columns if sys.stdout.isatty() else 170
    return Console(width=max(110, terminal))


def describe(layout: Layout) -> str:
    """A layout in one line: 'tp 2 sp 4 pp 1 dp 8, mb 1, zero 1, attention-output, mlp/16'."""
    axes = [f"{name} {getattr(layout, name)}" for name in ("tp", "sp", "pp", "dp")]
    axes += [
        f"{name} {getattr(layout, name)}" for name in ("ep", "vpp") if getattr(layout, name) > 1
    ]
    parts = [" ".join(axes), f"mb {layout.micro_batch}", f"zero {layout.zero}"]
    if layout.tp_sp:
        parts.append("TP-SP")
    if layout.sp > 1:
        parts.append(layout.schedule)
    if layout.recompute != "none":
        parts.append(layout.recompute)
    if layout.mlp_chunks:
        parts.append(f"mlp/{layout.mlp_chunks}")
    if layout.loss_chunks:
        parts.append(f"loss/{layout.loss_chunks}")
    return ", ".join(parts)


def print_found(found: Found, cluster: Cluster, flags: Mapping[str, Any]) -> None:
    """Everything that a search found."""
    out = console()
    if found.fitting:
        out.print(_ranking(found.fitting, cluster))
        out.print(_memory(found.fitting[0]))
        for other in found.fitting[1:4]:
            out.print(
                f"{describe(other.layout)}: {why_slower(found.fitting[0], other)}", style="dim"
            )
    else:
        out.print("no layout fits", style="bold")
    for near in found.nearest[:3]:
        out.print(f"does not fit: {describe(near.layout)}: {lacks(near)}", style="dim")
    for reason, count in found.refused[:3]:
        out.print(f"not possible ({count} layouts): {reason}", style="dim")
    out.print(f"{found.counted} layouts looked at. {provenance(cluster)}", highlight=False)
    if found.fitting:
        command = launch_command(found.fitting[0].layout, cluster, flags)
        print(f"\n{command} DATA_AND_TRAINING_ARGUMENTS")


def _ranking(estimates: Sequence[Estimate], cluster: Cluster) -> Table:
    layout = estimates[0].layout
    table = Table(
        title=f"{layout.ranks} x {cluster.machine.device.name}, {layout.global_batch} sequences of "
        f"{layout.sequence_length} tokens a step; seconds, predicted",
        caption=f"Within {BAND:.0%}, which predictions cannot tell apart, the least TP x PP "
        "comes first. MFU counts attention as if there were no causal mask.",
    )
    for header in ("layout", "step", "MFU %", "compute", "TP", "SP", "EP", "PP", "DP"):
        table.add_column(header, justify="left" if header == "layout" else "right")
    for header in ("bubble", "optimizer", "GiB", "margin"):
        table.add_column(header, justify="right")
    for each in estimates:
        time = each.time
        parts = (time.compute, time.tp, time.sp, time.ep, time.pp, time.dp, time.bubble)
        table.add_row(
            describe(each.layout),
            f"{each.step_time:.2f}",
            f"{100 * each.mfu:.1f}",
            *(f"{part:.2f}" for part in (*parts, time.optimizer)),
            f"{each.peak_memory / _GIB:.1f}",
            f"{each.margin / _GIB:.1f}",
            style="bold" if each is estimates[0] else "",
        )
    return table


def _memory(best: Estimate) -> Table:
    table = Table(title=f"GiB of one rank by stage, {describe(best.layout)}")
    table.add_column("stage")
    names = list(next(iter(best.memory.values())).parts())
    for name in (*names, "total"):
        table.add_column(name, justify="right")
    for stage, memory in best.memory.items():
        parts = [*memory.parts().values(), memory.total]
        table.add_row(f"{stage + 1} of {best.layout.pp}", *(f"{part / _GIB:.2f}" for part in parts))
    return table


def why_slower(best: Estimate, other: Estimate) -> str:
    """The parts in which a layout loses most against the first one."""
    first, second = asdict(best.time), asdict(other.time)
    loss = other.step_time - best.step_time
    worse = sorted(((second[name] - first[name], name) for name in first), reverse=True)
    parts = [f"{name} +{more:.2f} s" for more, name in worse[:2] if more > 0.05 * loss]
    percent = 100 * loss / best.step_time
    if loss <= 0:
        return (
            f"{-percent:.1f}% faster, too little to tell, with more ranks or a larger micro-batch"
        )
    return f"{percent:.1f}% slower" + (f": {', '.join(parts)}" if parts else "")


def lacks(near: Estimate) -> str:
    """By how much a layout does not fit, and what takes most."""
    memory = max(near.memory.values(), key=lambda each: each.total)
    name, size = max(memory.parts().items(), key=lambda item: item[1])
    most = "what comes and goes (moment)" if name == "moment" else name
    return f"{-near.margin / _GIB:.2f} GiB too much; most is {most}, {size / _GIB:.1f} GiB"


def provenance(cluster: Cluster) -> str:
    """How many constants were calibrated, and how many are assumed."""
    bases = [cluster.origin(name).basis for name in Constants.names()]
    counts = [f"{bases.count(basis)} {basis.value}" for basis in Basis if basis in bases]
    return (
        f"Constants of {cluster.name}: {', '.join(counts)}; peak "
        f"{cluster.machine.device.peak.basis.value}, memory {cluster.capacity.basis.value}."
    )


def as_dict(found: Found, cluster: Cluster, flags: Mapping[str, Any]) -> dict[str, Any]:
    """The whole outcome; seconds and bytes."""
    return {
        "cluster": cluster.name,
        "capacity_bytes": cluster.capacity.value,
        "layouts": [estimate_as_dict(each) for each in found.fitting],
        "does_not_fit": [estimate_as_dict(each) for each in found.nearest],
        "refused": [{"reason": reason, "layouts": count} for reason, count in found.refused],
        "looked_at": found.counted,
        "constants": constants_as_dict(cluster),
        "command": launch_command(found.fitting[0].layout, cluster, flags)
        if found.fitting
        else None,
    }


def estimate_as_dict(each: Estimate) -> dict[str, Any]:
    """One layout."""
    return {
        "layout": asdict(each.layout),
        "step_time_s": each.step_time,
        "time_s": asdict(each.time),
        "mfu": each.mfu,
        "memory_bytes": {stage: memory.parts() for stage, memory in each.memory.items()},
        "peak_memory_bytes": each.peak_memory,
        "margin_bytes": each.margin,
        "fits": each.fits,
    }


def constants_as_dict(cluster: Cluster) -> dict[str, Any]:
    """Value, unit and origin of each constant."""
    return {
        name: {
            "value": getattr(cluster.constants, name),
            "unit": unit_of(name),
            "basis": cluster.origin(name).basis.value,
            "source": cluster.origin(name).source,
        }
        for name in Constants.names()
    }


def print_fit(fit: Fit) -> None:
    """Fitted constants beside their priors."""
    table = Table(title=f"fitted to {fit.timed} times and {fit.decided} outcomes")
    for header in ("constant", "prior", "fitted", "unit", "basis", "meaning"):
        table.add_column(header, justify="right" if header in ("prior", "fitted") else "left")
    for name in Constants.names():
        table.add_row(
            name,
            f"{prior_of(name)[0]:.4g}",
            f"{getattr(fit.cluster.constants, name):.4g}",
            unit_of(name),
            fit.cluster.origin(name).basis.value,
            meaning_of(name),
        )
    console().print(table)


def print_scores(predicted: Sequence[Predicted]) -> None:
    """A line a group, and one for all."""
    groups = score_groups(predicted)
    table = Table(title="predictions against measured runs")
    headers = ("ran", "OOM", "other", "OOM precision", "OOM recall", "MAPE %", "Kendall tau")
    table.add_column("group")
    for header in (*headers, "regret %", "of best of 3 %", "top-1 OOM"):
        table.add_column(header, justify="right")
    for each in groups:
        table.add_row(*_cells(each))
    if len(groups) > 1:
        table.add_section()
        table.add_row(*_cells(overall(predicted, groups)), style="bold")
    console().print(table)


def overall(predicted: Sequence[Predicted], groups: Sequence[Scores]) -> Scores:
    """All rows together; tau and regrets, which compare within a group, as means over groups."""
    whole = asdict(score(predicted, "all"))
    for name in ("tau", "regret", "regret_of_3"):
        values = [value for each in groups if (value := getattr(each, name)) is not None]
        whole[name] = sum(values) / len(values) if values else None
    whole["top1_oom"] = any(each.top1_oom for each in groups)
    return Scores(**whole)


def _cells(each: Scores) -> list[str]:
    def share(value: float | None, digits: int = 3, scale: float = 1) -> str:
        return "-" if value is None else f"{scale * value:.{digits}f}"

    return [
        each.name,
        str(each.finished),
        str(each.out_of_memory),
        str(each.others),
        share(each.oom_precision),
        share(each.oom_recall),
        share(each.mape, 2, 100),
        share(each.tau),
        share(each.regret, 2, 100),
        share(each.regret_of_3, 2, 100),
        "-" if each.top1_oom is None else ("yes" if each.top1_oom else "no"),
    ]


def scores_as_dict(predicted: Sequence[Predicted]) -> dict[str, Any]:
    """Scores of each group and of all."""
    groups = score_groups(predicted)
    return {
        "groups": [asdict(each) for each in groups],
        "all": asdict(overall(predicted, groups)),
    }
