# SPDX-License-Identifier: Apache-2.0
"""`megatron-seqpar trace`: join the trace files of a step; say what they hold. Needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def trace(
    folder: Annotated[
        Path, typer.Argument(help="A folder DIR/step-NNNNNN that --seqpar-trace wrote.")
    ],
) -> None:
    """Join the files of all ranks of a traced step in one, and print each rank's times.

    Rank 0 of a run does this by itself for the files it can see; ranks of other machines write on
    those machines, from where their files are to be copied first.
    """
    from rich.console import Console
    from rich.table import Table

    from megatron_seqpar.telemetry import trace as traces

    path = traces.merge(folder)
    table = Table(title=str(folder))
    for column in ("rank", "step, s", "tiles, s", "waits, s", "posts, s", "merges, s", "sent, MiB"):
        table.add_column(column, justify="right")
    for rank, totals in sorted(traces.summary(path).items()):
        seconds = (f"{totals.get(kind, 0.0):.4f}" for kind in _KINDS)
        table.add_row(str(rank), *seconds, f"{totals.get('bytes', 0.0) / 2**20:.2f}")
    Console(width=100).print(table)
    typer.echo(path)


_KINDS = ("iteration", "tile", "wait", "post", "merge")
