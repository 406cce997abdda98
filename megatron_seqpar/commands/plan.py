# SPDX-License-Identifier: Apache-2.0
"""`megatron-seqpar plan`: which parallel layout, and how far to trust it. Needs no torch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_seqpar.errors import SeqParError

if TYPE_CHECKING:
    from megatron_seqpar.planner import Cluster
    from megatron_seqpar.planner.runs import Run

plan = typer.Typer(
    help="Which parallel layout for a model, a cluster and a sequence length.",
    pretty_exceptions_enable=False,
    add_completion=False,
)

_CLUSTER = "A name in configs/planner or such a file."


@plan.callback(invoke_without_command=True)
def search_layouts(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Option(help="A name in configs/models, a file of such flags, or an HF config.json."),
    ] = None,
    cluster: Annotated[str, typer.Option(help=_CLUSTER)] = "dgx-h100",
    seq_length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 8192,
    global_batch_tokens: Annotated[
        str, typer.Option(help="Tokens of a step: a number, or one with K or M (binary).")
    ] = "4M",
    nodes: Annotated[
        int | None, typer.Option(help="Nodes; default: those of --cluster NAME-xN, or one.")
    ] = None,
    gpus: Annotated[int | None, typer.Option(help="Or GPUs.")] = None,
    top: Annotated[int, typer.Option(help="Layouts to show.")] = 10,
    plot: Annotated[
        Path | None, typer.Option(help="Draw MFU over ranks and lengths, and memory (.png).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, nothing else.")] = False,
) -> None:
    """Search the parallel layouts of a number of GPUs, and rank those that fit by step time.

    Prints what each part of a step takes, memory by component of the first, middle and last
    pipeline stage, why the runners-up are slower, what nearly fits, and the command that starts
    the first. Without --model a subcommand is needed.
    """
    if context.invoked_subcommand is not None:
        return
    if model is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)
    from megatron_seqpar.planner.constants_file import read_planner_cluster
    from megatron_seqpar.planner.model_file import read_model
    from megatron_seqpar.planner.search import search
    from megatron_seqpar.shipped import model_file

    from .plan_report import as_dict, print_found

    flags, sizes = read_model(model_file(model))
    described = read_planner_cluster(cluster)
    ranks = _ranks(described, nodes, gpus)
    batch = _sequences(global_batch_tokens, seq_length)
    found = search(
        sizes,
        described,
        ranks=ranks,
        sequence_length=seq_length,
        global_batch=batch,
        keep=max(1, top),
    )
    if plot is not None:
        from .plan_plot import draw_plan

        draw_plan(sizes, described, found, plot)
    if as_json:
        typer.echo(json.dumps(as_dict(found, described, flags)))
    else:
        print_found(found, described, flags)
    if plot is not None:
        typer.echo(f"drawn in {plot}", err=as_json)


@plan.command()
def calibrate(
    runs: Annotated[list[Path], typer.Argument(help="CSV files of measured runs.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")],
    cluster: Annotated[str, typer.Option(help="What they ran on. " + _CLUSTER)] = "dgx-a100",
) -> None:
    """Fit the constants of a cluster to measured runs, with priors, so that a few already help."""
    from megatron_seqpar.planner.constants_file import (
        read_planner_cluster,
        save_planner_cluster,
    )
    from megatron_seqpar.planner.fit import calibrate as fit
    from megatron_seqpar.planner.runs import check_device, read_runs

    from .plan_report import print_fit

    described = read_planner_cluster(cluster)
    measured = read_runs(runs)
    check_device(measured, described.machine.device.models, cluster)
    names = ", ".join(path.stem for path in runs)
    fitted = fit(described, measured, f"plan calibrate, {len(measured)} runs of {names}")
    save_planner_cluster(fitted.cluster, output)
    print_fit(fitted)
    typer.echo(f"written to {output}")


@plan.command()
def validate(
    runs: Annotated[list[Path], typer.Argument(help="CSV files of measured runs.")],
    cluster: Annotated[str, typer.Option(help="What they ran on. " + _CLUSTER)] = "dgx-a100",
    predictions: Annotated[
        Path | None, typer.Option(help="Write the rows with predictions beside them (.csv).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, nothing else.")] = False,
) -> None:
    """Predict measured runs and say how good the predictions are, for each group of runs."""
    from megatron_seqpar.planner.constants_file import read_planner_cluster
    from megatron_seqpar.planner.runs import check_device, read_runs
    from megatron_seqpar.planner.validate import predict_runs, write_predictions

    from .plan_report import print_scores, scores_as_dict

    measured: list[Run] = read_runs(runs)
    described = read_planner_cluster(cluster)
    check_device(measured, described.machine.device.models, cluster)
    predicted = predict_runs(measured, described)
    if predictions is not None:
        write_predictions(predicted, predictions)
    if as_json:
        typer.echo(json.dumps(scores_as_dict(predicted)))
    else:
        print_scores(predicted)
        if predictions is not None:
            typer.echo(f"written to {predictions}")


@plan.command()
def reproduce(
    study: Annotated[str, typer.Argument(help="lightseq: DISTFLASHATTN's comparisons.")],
    plot: Annotated[
        Path | None, typer.Option(help="Draw how both scale to 1,024 GPUs (.png, .svg).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, nothing else.")] = False,
) -> None:
    """Simulate a published comparison, and what this project would do there and elsewhere."""
    if study != "lightseq":
        raise SeqParError(f"plan reproduce {study}: unknown; use lightseq")
    from megatron_seqpar.planner.constants_file import read_planner_cluster

    from .plan_reproduce import draw_scaling, lightseq_as_dict, print_lightseq

    cluster = read_planner_cluster("lightseq")
    if plot is not None:
        draw_scaling(cluster, plot)
    if as_json:
        typer.echo(json.dumps(lightseq_as_dict(cluster)))
    else:
        print_lightseq(cluster)
    if plot is not None:
        typer.echo(f"drawn in {plot}", err=as_json)


def _ranks(cluster: Cluster, nodes: int | None, gpus: int | None) -> int:
    if nodes is not None and gpus is not None:
        raise SeqParError(f"--nodes {nodes} with --gpus {gpus}: give one of them")
    nodes_there = cluster.machine.nodes or 1
    ranks = gpus if gpus is not None else (nodes or nodes_there) * cluster.node_size
    if ranks < 1 or (nodes is not None and nodes < 1):
        raise SeqParError(f"--gpus {gpus}, --nodes {nodes}: use 1 or more")
    if ranks > cluster.node_size and ranks % cluster.node_size:
        raise SeqParError(
            f"--gpus {ranks}: more than a node of {cluster.node_size} must be whole nodes"
        )
    cluster.machine.check_holds(ranks, f"--gpus {gpus}" if gpus else f"--nodes {nodes}")
    return ranks


def _sequences(text: str, length: int) -> int:
    """Sequences of a step; "4M" is 4 x 2^20 tokens."""
    match = re.fullmatch(r"(\d+)([KkMm]?)", text.strip())
    if match is None:
        raise SeqParError(f"--global-batch-tokens {text}: use a number such as 4194304, 512K or 4M")
    tokens = int(match[1]) * {"": 1, "k": 2**10, "m": 2**20}[match[2].lower()]
    if length < 1 or tokens < length:
        raise SeqParError(
            f"--global-batch-tokens {text} with --seq-length {length}: less than one sequence"
        )
    return tokens // length
