# SPDX-License-Identifier: Apache-2.0
"""`plan reproduce`: published comparisons, simulated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from megatron_seqpar.mfu import model_flops, utilization
from megatron_seqpar.planner import Cluster
from megatron_seqpar.planner.constants_file import read_planner_cluster
from megatron_seqpar.planner.lightseq import Simulated, anchors, named_model, simulate_cell, table
from megatron_seqpar.planner.lightseq_cells import Method

from .plan_report import console, provenance

_OTHERS = ("dgx-h100", "dgx-h200", "dgx-b200")


def print_lightseq(cluster: Cluster) -> None:
    """Anchors with their errors, then every cell, then other hardware."""
    out = console()
    fitted = Table(title="calibrated to these published cells; seconds of an iteration")
    for header in ("model", "GPUs", "tokens", "method", "published", "predicted", "error %"):
        fitted.add_column(header, justify="left" if header in ("model", "method") else "right")
    for each in anchors(cluster):
        assert each.published is not None
        assert each.error is not None
        fitted.add_row(
            each.model,
            str(each.ranks),
            f"{each.thousands}K",
            each.method.value,
            f"{each.published:.2f}",
            f"{each.time.total:.2f}",
            f"{100 * each.error:+.1f}",
        )
    out.print(fitted)
    out.print(_grid("all cells, predicted, seconds; anchors in brackets", table(cluster)))
    out.print(_hardware())
    out.print(provenance(cluster), highlight=False)


def _grid(title: str, cells: list[Simulated]) -> Table:
    grid = Table(title=title)
    for header in ("model", "GPUs", "tokens"):
        grid.add_column(header, justify="left" if header == "model" else "right")
    for method in Method:
        grid.add_column(method.value, justify="right")
    rows: dict[tuple[str, int, int], dict[Method, Simulated]] = {}
    for each in cells:
        rows.setdefault((each.model, each.ranks, each.thousands), {})[each.method] = each
    for (model, ranks, thousands), row in rows.items():
        texts = []
        for method in Method:
            each = row[method]
            known = "" if each.published is None else f" [{each.published:.2f}]"
            texts.append(f"{each.time.total:.2f}{known}")
        grid.add_row(
            model, str(ranks), f"{thousands}K", *(text.replace("[", "\\[") for text in texts)
        )
    return grid


def _hardware() -> Table:
    grid = Table(
        title="llama2-7b, 8 GPUs, 256K tokens on other hardware, seconds (assumed constants)"
    )
    grid.add_column("cluster")
    for method in Method:
        grid.add_column(method.value, justify="right")
    for name in _OTHERS:
        cluster = read_planner_cluster(name)
        times = [simulate_cell(cluster, "llama2-7b", 8, 256, method).total for method in Method]
        grid.add_row(name, *(f"{time:.2f}" for time in times))
    return grid


def lightseq_as_dict(cluster: Cluster) -> dict[str, Any]:
    """Every cell."""
    return {
        "cells": [
            {
                "model": each.model,
                "gpus": each.ranks,
                "tokens": each.thousands * 1024,
                "method": each.method.value,
                "predicted_s": each.time.total,
                "published_s": each.published,
            }
            for each in table(cluster)
        ]
    }


def draw_scaling(cluster: Cluster, path: Path) -> None:
    """Causal MFU over ranks of the SP axis to 1,024, with 32K tokens each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    counts = [2**power for power in range(3, 11)]
    model = named_model("llama2-7b")
    colours = ("tab:blue", "tab:orange", "tab:green", "tab:red")
    described = [cluster, *(read_planner_cluster(name) for name in _OTHERS)]
    for machine, colour in zip(described, colours, strict=True):
        for method, style in ((Method.DISTFLASHATTN, ":"), (Method.OURS, "-")):
            shares = []
            for ranks in counts:
                seconds = simulate_cell(machine, "llama2-7b", ranks, 32 * ranks, method).total
                flops = model_flops(model, 32 * 1024 * ranks, causal=True)
                shares.append(100 * utilization(flops, seconds, ranks, machine.peak))
            label = f"{machine.name}, {method.value}"
            axes.plot(counts, shares, style, color=colour, marker=".", label=label)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("GPUs of the SP axis, 32K tokens each")
    axes.set_ylabel("causal MFU %, predicted")
    axes.set_ylim(0, 100)
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)
