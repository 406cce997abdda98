# SPDX-License-Identifier: Apache-2.0
"""`megatron-seqpar sweep`: many parallel layouts as real runs, into one CSV."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def sweep(
    space: Annotated[
        Path, typer.Argument(help="What to sweep: a name in configs/runs, or such a file.")
    ],
    output: Annotated[
        Path | None, typer.Option(help="Folder of rows, logs, CSV and picture; runs/sweep/NAME.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Layouts that each table shows.")] = 10,
    retry: Annotated[
        bool, typer.Option("--retry", help="Run again what ended with an error or out of memory.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Run everything again.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the command of every row and stop.")
    ] = False,
) -> None:
    """Train every layout of SPACE for a few steps, here or with sbatch, and report.

    Writes OUTPUT/sweep.csv after every row: status, step time, MFU, memory, bytes, versions. It is
    what `megatron-seqpar plan calibrate` reads. Interrupted, the same command goes on where it was.
    """
    from megatron_seqpar.shipped import run_file
    from megatron_seqpar.sweep.run import run_sweep

    space = run_file(space, "sweep")
    run_sweep(
        space,
        output or Path("runs") / "sweep" / space.stem,
        retry=retry,
        fresh=fresh,
        dry_run=dry_run,
        top=top,
    )
