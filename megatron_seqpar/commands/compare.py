# SPDX-License-Identifier: Apache-2.0
"""`megatron-seqpar compare`: the same training as SP, TP, mixes, CP and on one rank."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def compare(
    config: Annotated[
        Path, typer.Argument(help="What to compare: a name in configs/runs, or such a file.")
    ],
    output: Annotated[
        Path | None, typer.Option(help="Folder of rows, logs and results; runs/compare/NAME.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Result file; OUTPUT/compare.json.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture; OUTPUT/compare.png.")] = None,
    retry: Annotated[
        bool, typer.Option("--retry", help="Run again what ended with an error or out of memory.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Run everything again.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the command of every way and stop.")
    ] = False,
) -> None:
    """Train CONFIG's model every way that its ranks allow, and compare.

    Same model, tokens, seed, data order, kernel and recomputation in all. Ends with a table and a
    picture: losses and their largest difference, step time, tokens/s, MFU, memory and bytes sent.
    A way that fails is a row that says why. Interrupted, the same command goes on where it was.
    """
    from rich.console import Console

    from megatron_seqpar.compare.config import CompareConfig
    from megatron_seqpar.compare.run import run_comparison
    from megatron_seqpar.experiments.setting import read_setting
    from megatron_seqpar.shipped import run_file

    config = run_file(config, "compare")
    folder = output or Path("runs") / "compare" / config.stem
    run_comparison(
        read_setting(CompareConfig, config),
        folder,
        json_file or folder / "compare.json",
        plot or folder / "compare.png",
        Console(highlight=False, width=None if sys.stdout.isatty() else 170),
        retry=retry,
        fresh=fresh,
        dry_run=dry_run,
    )
