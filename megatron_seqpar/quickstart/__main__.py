# SPDX-License-Identifier: Apache-2.0
"""`bash scripts/quickstart.sh`, or `python -m megatron_seqpar.quickstart` once installed.

A comparison of four ways, with nothing to write first: SP, one rank, and tensor parallelism with
the same attention kernel and as shipped.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from megatron_seqpar.compare.config import CompareConfig, WaySection
from megatron_seqpar.compare.run import run_comparison
from megatron_seqpar.errors import SeqParError
from megatron_seqpar.experiments.corpus import STDLIB
from megatron_seqpar.experiments.layout import STOCK
from megatron_seqpar.experiments.machine import look
from megatron_seqpar.shipped import model_file

console = Console(highlight=False, width=None if sys.stdout.isatty() else 170)


def ways(ranks: int, schedule: str) -> tuple[WaySection, ...]:
    """The ways that are compared over `ranks`."""
    one = WaySection(ranks=1)
    if ranks == 1:
        return (one,)
    return (
        WaySection(ranks=ranks, sp=ranks, schedule=schedule),
        one,
        WaySection(ranks=ranks, tp=ranks, tp_sp=True),
        WaySection(ranks=ranks, tp=ranks, tp_sp=True, kernel=STOCK),
    )


def quickstart(
    input: Annotated[
        Path | None,
        typer.Option(help='Your text, one {"text": ...} a line; default: Python\'s own library.'),
    ] = None,
    json_key: Annotated[str, typer.Option(help="Key of the text in --input.")] = "text",
    steps: Annotated[int, typer.Option(min=2, help="Training steps of each run.")] = 10,
    seq_length: Annotated[int, typer.Option(min=16, help="Tokens a sequence.")] = 8192,
    batch: Annotated[int, typer.Option(min=1, help="Sequences a step.")] = 1,
    nproc: Annotated[
        int | None, typer.Option(help="Ranks to split the sequence over; default 2.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
    schedule: Annotated[str, typer.Option(help="As --seqpar-schedule.")] = "auto",
    model: Annotated[
        str, typer.Option(help="A name in configs/models, or a file of Megatron's flags.")
    ] = "quickstart",
    output: Annotated[Path, typer.Option(help="Folder of everything written.")] = Path(
        "runs/quickstart"
    ),
    fresh: Annotated[bool, typer.Option(help="Do everything again.")] = False,
) -> None:
    """Train a small GPT with its sequence split over ranks, then without, and compare."""
    started = time.monotonic()
    try:
        here = look(device, nproc)
        config = CompareConfig(
            model=model_file(model),
            data=STDLIB if input is None else str(input),
            json_key=json_key,
            steps=steps,
            seq_length=(seq_length,),
            global_batch_size=batch,
            ranks=here.ranks,
            device="cuda" if here.device == "cuda" else "cpu",
            ways=ways(here.ranks, schedule),
        )
        for note in here.notes:
            console.print(f"note: {note}", markup=False)
        picture = output / "losses.png"
        rows = run_comparison(
            config, output, output / "quickstart.json", picture, console,
            retry=True, fresh=fresh, loss_tables=True,
        )  # fmt: skip
        failed = [row["label"] for row in rows if row["status"] != "ok"]
        if failed:
            raise SeqParError(f"not all runs ended well: {', '.join(failed)}; see above")
    except SeqParError as error:
        Console(stderr=True).print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    console.print(f"total time: {(time.monotonic() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    typer.run(quickstart)
