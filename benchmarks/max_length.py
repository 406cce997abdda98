# SPDX-License-Identifier: Apache-2.0
"""The longest sequence that trains on one device: stock Megatron against every way of ours.

    python benchmarks/max_length.py --memory-mib 256 --output benchmarks/results/max_length.json

For each way the length is doubled until a training run of two steps fails for lack of memory, then
the gap is halved until it is within `--precision`. On a CPU a rank may take `--memory-mib` more
than it has when training begins (RLIMIT_DATA), and large blocks go back to the system when they are
freed, so that what is live counts; on a GPU the limit is the GPU's memory. A run that takes longer
than `--seconds` is not waited for: its way is reported as "at least".
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
import machine
import memory_plot
from memory_ways import Outcome, figures, run, ways

from megatron_seqpar.data import StandardLibrary, prepare_corpus
from megatron_seqpar.mfu import read_flags
from megatron_seqpar.quickstart.machine import look
from megatron_seqpar.quickstart.plan import Training

ROOT = Path(__file__).resolve().parents[1]
STEPS = 2  # the optimizer's state is there from the first step's end
BLOCKS_RETURNED = {"MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_ARENA_MAX": "2"}


@dataclass
class Search:
    """What a search found: the longest length that trained, and all tries by length."""

    longest: int = 0
    at_least: bool = False
    tries: dict[int, str] = field(default_factory=dict)
    seconds: float | None = None


def search(
    attempt: Callable[[int], tuple[str, float | None]],
    *,
    start: int,
    unit: int,
    most: int,
    precision: float,
) -> Search:
    """Double from `start`, then halve the gap, in multiples of `unit`, up to `most`.

    attempt: status of a length ('ok', 'oom', 'too slow', 'error') and seconds a step. Raises
    SystemExit for an error that is not about memory, so that no failure passes for a limit.
    """
    found = Search()
    fails: int | None = None

    def fits(length: int) -> bool:
        nonlocal fails
        status, seconds = attempt(length)
        found.tries[length] = status
        if status == "error":
            raise SystemExit(f"{length} tokens failed for another reason than memory")
        if status == "ok":
            found.longest, found.seconds = length, seconds
            return True
        found.at_least = status == "too slow"
        fails = length
        return False

    length = start
    while fits(length):
        if length >= most:
            found.at_least = True
            return found
        length = min(2 * length, most)
    while fails is not None and not found.at_least:
        low = found.longest
        middle = (low + fails) // 2 // unit * unit
        if middle <= low or (fails - low) <= precision * max(low, unit):
            break
        fits(middle)
    return found


def main(
    model: Annotated[Path, typer.Option(help="Model file.")] = (
        ROOT / "configs" / "models" / "llama3-mini.yaml"
    ),
    memory_mib: Annotated[int, typer.Option(help="On a CPU: what a rank may take.")] = 256,
    pieces: Annotated[int, typer.Option(help="Of MLPs and of the loss.")] = 16,
    start: Annotated[int, typer.Option(help="First length tried.")] = 512,
    most: Annotated[int, typer.Option(help="Last length tried.")] = 2**20,
    precision: Annotated[float, typer.Option(help="Where to stop, relative.")] = 0.1,
    seconds: Annotated[float, typer.Option(help="Longest run.")] = 240.0,
    only: Annotated[str, typer.Option(help="Names of ways, separated by ';'.")] = "",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int, typer.Option(help="Of the one rank, on a CPU.")] = 2,
    output: Annotated[Path | None, typer.Option(help="Write JSON here, and a PNG beside.")] = None,
    work: Annotated[Path, typer.Option(help="Folder for corpus and reports.")] = Path(
        "runs/benchmark"
    ),
) -> None:
    """Search and print; see the text at the top of this file."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    corpus = prepare_corpus(StandardLibrary(), work / "stdlib")
    here = look(device, 1)
    cap = memory_mib if here.device == "cpu" else 0
    rows: dict[str, Any] = {}
    for name, way in ways(pieces).items():
        if (only and name not in only.split(";")) or (way.gpu and here.device == "cpu"):
            continue

        def attempt(length: int, name: str = name, way: Any = way) -> tuple[str, float | None]:
            training = Training(model, corpus, work / "cache", STEPS, length, batch=1)
            outcome: Outcome = run(
                name,
                way,
                training,
                here,
                work / "max_length",
                cap_mib=cap,
                seconds=seconds,
                environment={"OMP_NUM_THREADS": str(threads), **BLOCKS_RETURNED},
            )
            took = figures(outcome)["seconds"] if outcome.status == "ok" else None
            told = f" {took:.2f} s/step" if took is not None else ""
            print(f"{name}, {length} tokens: {outcome.status}{told}", flush=True)
            if outcome.status == "error":
                print(outcome.text, flush=True)
            return outcome.status, took

        found = search(attempt, start=start, unit=256, most=most, precision=precision)
        rows[name] = {
            "longest": found.longest,
            "at_least": found.at_least,
            "seconds_per_step_there": found.seconds,
            "tries": {str(length): status for length, status in sorted(found.tries.items())},
        }
    limit = f"{memory_mib} MiB to take" if cap else f"the memory of one {here.name}"
    result = {
        **machine.describe(),
        "device": here.name,
        "name": model.stem,
        "model": read_flags(model),
        "limit": limit,
        "pieces": pieces,
        "precision": precision,
        "ways": rows,
    }
    table = Table(title=f"Longest sequence that trains: {limit}")
    for column in ("way", "tokens", "of stock", "of stock, full recompute", "s/step there"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for name, row in rows.items():
        ratios = [
            f"{row['longest'] / rows[base]['longest']:.1f}" if base in rows else ""
            for base in ("stock", "stock, full recompute")
        ]
        table.add_row(
            name,
            f"{'>= ' if row['at_least'] else ''}{row['longest']:,}",
            *ratios,
            f"{row['seconds_per_step_there'] or 0:.2f}",
        )
    Console(width=120).print(table)
    if output is not None:
        machine.write(result, output)
        memory_plot.longest(result, output.with_suffix(".png"))
        print(f"{output}\n{output.with_suffix('.png')}")


if __name__ == "__main__":
    typer.run(main)
