# SPDX-License-Identifier: Apache-2.0
"""`megatron-seqpar schedule`: build a schedule, prove it, print it, draw it. Needs no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from megatron_seqpar.attention import Schedule


def schedule(
    size: Annotated[int, typer.Option("--size", "-p", help="Ranks of the SP axis.")],
    seq_length: Annotated[
        int | None, typer.Option(help="Tokens of the whole sequence, split as evenly as can be.")
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(help="Or the tokens of each rank: 1000,1000,700.")
    ] = None,
    name: Annotated[
        str, typer.Option("--schedule", help="A schedule's name, or auto.")
    ] = "balanced",
    mask: Annotated[
        str,
        typer.Option(
            help="causal, full, window:LEFT[,RIGHT[,SINKS]], prefix:LENGTH, documents:END,END,..."
        ),
    ] = "causal",
    heads: Annotated[int, typer.Option(help="Query heads of a rank (after a TP split).")] = 32,
    kv_heads: Annotated[
        int | None, typer.Option(help="Key/value heads; default: as many as query heads.")
    ] = None,
    head_dim: Annotated[int, typer.Option(help="Dim of a head.")] = 128,
    dtype: Annotated[
        str, typer.Option(help="Of q, k, v: bfloat16, float16, float32 or float64.")
    ] = "bfloat16",
    backward: Annotated[
        bool, typer.Option("--backward", help="Show the backward pass step by step.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw it in this file (.png, .svg, .pdf).")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the whole plan as JSON, nothing else.")
    ] = False,
) -> None:
    """Show who computes which tile of attention when, and what moves.

    Prints every step of every rank with its tiles and transfers, the work, bytes and messages of
    each rank in both passes, the idle fraction, and the outcome of the proof of both passes.
    """
    from .schedule_report import as_dict, print_report

    built = _build(size, seq_length, lengths, name, mask, heads, kv_heads, head_dim)
    built.verify()
    built.backward().verify()
    shown = built.backward() if backward else built
    if plot is not None:
        from .schedule_plot import save

        save(shown, dtype, plot)
    if as_json:
        typer.echo(json.dumps(as_dict(built, dtype)))
    else:
        print_report(built, shown, dtype)
    if plot is not None:
        typer.echo(f"drawn in {plot}", err=as_json)


def _build(
    size: int,
    seq_length: int | None,
    lengths: str | None,
    name: str,
    mask: str,
    heads: int,
    kv_heads: int | None,
    head_dim: int,
) -> Schedule:
    from megatron_seqpar.attention import build_schedule
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
    return build_schedule(
        name,
        size=size,
        seq_length=seq_length,
        lengths=chunks,
        mask=mask,
        query_heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
    )
