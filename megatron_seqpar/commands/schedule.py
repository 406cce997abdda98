# SPDX-License-Identifier: Apache-2.0
"""`megatron-seqpar schedule`: build a schedule, prove it, cost it, draw it. Needs no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from megatron_seqpar.attention import Schedule
    from megatron_seqpar.attention.ir import Problem
    from megatron_seqpar.attention.schedules.auto import Choice
    from megatron_seqpar.simulate import Cluster

_MASKS = "causal, full, window:LEFT[,RIGHT[,SINKS]], prefix:LENGTH, documents:END,END,..."


def schedule(
    size: Annotated[int, typer.Option("--size", "-p", help="Ranks of the SP axis.")],
    seq_length: Annotated[
        int | None, typer.Option(help="Tokens of the whole sequence, split as evenly as can be.")
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(help="Or the tokens of each rank: 1000,1000,700.")
    ] = None,
    token_layout: Annotated[
        str, typer.Option(help="contiguous or zigzag: which tokens a rank owns.")
    ] = "contiguous",
    name: Annotated[
        str, typer.Option("--schedule", help="A schedule's name, or auto.")
    ] = "balanced",
    mask: Annotated[str, typer.Option(help=_MASKS)] = "causal",
    heads: Annotated[int, typer.Option(help="Query heads of a rank (after a TP split).")] = 32,
    kv_heads: Annotated[
        int | None, typer.Option(help="Key/value heads; default: as many as query heads.")
    ] = None,
    head_dim: Annotated[int, typer.Option(help="Dim of queries and keys of a head.")] = 128,
    value_dim: Annotated[
        int | None, typer.Option(help="Dim of values of a head; default: as of keys.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Samples, for predicted times.")] = 1,
    node_size: Annotated[
        int | None, typer.Option(help="Ranks that share a node; default: all, or the cluster's.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Of q, k, v: bfloat16, float16, float32 or float64.")
    ] = "bfloat16",
    backward: Annotated[
        bool, typer.Option("--backward", help="Show the backward pass step by step.")
    ] = False,
    explain: Annotated[
        bool,
        typer.Option("--explain", help="Print what auto compares: idle time, bytes, seconds."),
    ] = False,
    objective: Annotated[
        str, typer.Option(help="What auto goes by: time (on the cluster) or bytes.")
    ] = "time",
    cluster: Annotated[
        str | None,
        typer.Option(help="What runs it: a name in configs/clusters or a YAML file; dgx-h100."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw it in this file (.png, .svg, .pdf).")
    ] = None,
    timeline: Annotated[
        Path | None, typer.Option(help="Replay it on the cluster and draw that (.png, ...).")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Replay it into a trace for ui.perfetto.dev (.json).")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the whole plan as JSON, nothing else.")
    ] = False,
) -> None:
    """Show who computes which tile of attention when, and what moves.

    Prints every step of every rank with its tiles and transfers, the work, bytes and messages of
    each rank in both passes, the idle fraction, and the outcome of the proof of both passes. With
    --explain also every schedule that auto weighs against the others.
    """
    from .choice_report import choice_as_dict, print_choice
    from .schedule_report import as_dict, print_report

    machine = _cluster(cluster, size, node_size)
    problem = _problem(
        size, seq_length, lengths, token_layout, mask, heads, kv_heads, head_dim, value_dim,
        machine.node_size,
    )  # fmt: skip
    choice = None
    if explain or name == "auto":
        choice = _choice(problem, objective, machine.cluster, dtype, batch)
    built = choice.schedule if choice is not None and name == "auto" else _built(name, problem)
    built.verify()
    built.backward().verify()
    shown = built.backward() if backward else built
    if plot is not None:
        from .schedule_plot import save

        save(shown, dtype, plot)
    _replay(built, dtype, batch, machine.cluster, timeline, trace)
    if as_json:
        plan = as_dict(built, dtype)
        if choice is not None:
            plan["auto"] = choice_as_dict(choice)
        typer.echo(json.dumps(plan))
    else:
        print_report(built, shown, dtype)
        if choice is not None:
            print_choice(choice, everything=explain)
    for path in (plot, timeline, trace):
        if path is not None:
            typer.echo(f"drawn in {path}", err=as_json)


@dataclass(frozen=True)
class _Machine:
    cluster: Cluster
    node_size: int


def _cluster(name: str | None, size: int, node_size: int | None) -> _Machine:
    """The cluster, and how many of the axis' ranks share one of its nodes."""
    from megatron_seqpar.errors import ScheduleError
    from megatron_seqpar.simulate import load_cluster

    described = load_cluster(name or "dgx-h100")
    described.check_holds(size, f"--size {size}")
    if node_size is None:
        node_size = max(1, size)
        if name is not None:
            node_size = min(node_size, int(described.ranks_per_node.value))
            while size % node_size:  # nodes that are not full hold as many ranks each as can be
                node_size -= 1
    if node_size < 1 or size % node_size:
        raise ScheduleError(f"--node-size {node_size}: does not divide --size {size}")
    return _Machine(described.with_ranks_per_node(node_size), node_size)


def _problem(
    size: int,
    seq_length: int | None,
    lengths: str | None,
    token_layout: str,
    mask: str,
    heads: int,
    kv_heads: int | None,
    head_dim: int,
    value_dim: int | None,
    node_size: int,
) -> Problem:
    from megatron_seqpar.attention import TokenLayout
    from megatron_seqpar.attention.schedules import make_problem
    from megatron_seqpar.errors import ScheduleError

    if (seq_length is None) == (lengths is None):
        raise ScheduleError("give exactly one of --seq-length and --lengths")
    chunks = None
    if lengths is not None:
        try:
            chunks = [int(length) for length in lengths.split(",")]
        except ValueError:
            raise ScheduleError(
                f"--lengths {lengths}: give whole numbers with commas between them, 1000,1000,700"
            ) from None
    if token_layout == "zigzag":
        if seq_length is None:
            raise ScheduleError("--token-layout zigzag cuts evenly: give --seq-length")
        layout = TokenLayout.zigzag(size, seq_length)
    elif token_layout == "contiguous":
        layout = TokenLayout.contiguous(size, seq_length=seq_length, lengths=chunks)
    else:
        raise ScheduleError(f"--token-layout {token_layout}: use contiguous or zigzag")
    return make_problem(
        layout=layout,
        mask=mask,
        query_heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        node_size=node_size,
    )


def _choice(problem: Problem, objective: str, cluster: Cluster, dtype: str, batch: int) -> Choice:
    from megatron_seqpar.attention.schedules import explain

    return explain(
        problem,
        objective=objective,  # type: ignore[arg-type]  # checked there
        cluster=cluster,
        dtype=dtype,
        batch=batch,
    )


def _built(name: str, problem: Problem) -> Schedule:
    from megatron_seqpar.attention import build_schedule

    return build_schedule(
        name,
        layout=problem.layout,
        mask=problem.mask,
        query_heads=problem.query_heads,
        kv_heads=problem.kv_heads,
        head_dim=problem.head_dim,
        value_dim=problem.value_dim,
        node_size=problem.node_size,
    )


def _replay(
    built: Schedule,
    dtype: str,
    batch: int,
    cluster: Cluster,
    timeline: Path | None,
    trace: Path | None,
) -> None:
    """Replay both passes on the cluster, into the files asked for."""
    from megatron_seqpar.simulate import simulate

    if timeline is None and trace is None:
        return
    passes = (built, built.backward())
    replayed = tuple(simulate(each, cluster, dtype=dtype, batch=batch) for each in passes)
    if timeline is not None:
        from megatron_seqpar.simulate.plot import save_plot

        save_plot(replayed, timeline)
    if trace is not None:
        from megatron_seqpar.simulate.perfetto import trace_of

        trace_of(*replayed).write(trace)
