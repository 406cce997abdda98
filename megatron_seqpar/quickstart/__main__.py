# SPDX-License-Identifier: Apache-2.0
"""`bash scripts/quickstart.sh`, or `python -m megatron_seqpar.quickstart` once installed."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from megatron_seqpar.errors import SeqParError
from megatron_seqpar.experiments.corpus import STDLIB, corpus_of, fingerprint
from megatron_seqpar.quickstart import compare, machine, runs
from megatron_seqpar.quickstart.plan import Training, left_out, plan
from megatron_seqpar.shipped import model_file, pretraining_script

PACKAGE = Path(__file__).resolve().parents[1]
MODEL = model_file("quickstart")

console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)


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
    model: Annotated[Path, typer.Option(help="Model file: Megatron's flags as YAML.")] = MODEL,
    output: Annotated[Path, typer.Option(help="Folder of everything written.")] = Path(
        "runs/quickstart"
    ),
    fresh: Annotated[bool, typer.Option(help="Do everything again.")] = False,
) -> None:
    """Train a small GPT with its sequence split over ranks, then without, and compare."""
    started = time.monotonic()
    try:
        here = machine.look(device, nproc)
        console.print(f"device: {here.name}; {here.ranks} ranks")
        for note in (*here.notes, left_out(model, here.ranks)):
            if note is not None:
                console.print(f"note: {note}")
        text = STDLIB if input is None else str(input)
        corpus = corpus_of(text, output / "data", console, key=json_key, fresh=fresh)
        training = Training(model, corpus, output / "cache", steps, seq_length, batch)
        todo = plan(training, here, schedule=schedule)
        data = fingerprint(corpus)
        script = pretraining_script()
        sources = [PACKAGE, script]
        results = []
        for index, run in enumerate(todo, start=1):
            folder = output / run.name
            key = runs.run_key(run, here, sources, data)
            report = None if fresh else runs.finished(folder, key)
            header = f"[{index}/{len(todo)}] {run.label}: {run.ranks} rank(s), {run.attention}"
            if report is None:
                console.print(f"\n{header} (log: {folder / 'log.txt'})", markup=False)
                command = runs.launch_command(run, here, script, folder / runs.REPORT)
                report = runs.train(run.label, command, here.environment(), folder, key, _show)
            else:
                console.print(f"\n{header}: reused from {folder}", markup=False)
            results.append(compare.Result(run, report))
        picture = output / "losses.png"
        compare.plot(results, picture)
    except SeqParError as error:
        Console(stderr=True).print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    console.print()
    console.print(compare.loss_table(results))
    console.print(compare.cost_table(results))
    console.print(f"loss curves: {picture}    reports: {output}/*/report.json")
    console.print(f"total time: {(time.monotonic() - started) / 60:.1f} minutes")


def _show(line: str) -> None:
    console.print(f"    {line}", markup=False)


if __name__ == "__main__":
    typer.run(quickstart)
