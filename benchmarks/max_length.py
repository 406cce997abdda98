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

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from megatron_seqpar.bench import drawing
from megatron_seqpar.bench import result as result_file
from megatron_seqpar.bench.memory import ways_of
from megatron_seqpar.bench.memory_report import STYLE
from megatron_seqpar.bench.prepare import prepare, ranks_and_device
from megatron_seqpar.bench.training import described
from megatron_seqpar.experiments.longest import search

STEPS = 2  # the optimizer's state is there from the first step's end
BLOCKS_RETURNED = {"MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_ARENA_MAX": "2"}


def plot(result: dict[str, Any], path: Path) -> None:
    """The longest sequence of each way as bars, with its ratio to the first way's."""
    ways = {name: row for name, row in result["ways"].items() if row.get("longest")}
    figure, grid = drawing.figure(1, 1, (8.5, 0.55 * len(ways) + 1.6))
    axes, names = grid[0][0], list(ways)[::-1]
    values = [ways[name]["longest"] for name in names]
    bars = axes.barh(names, values, color=[STYLE[name][0] for name in names])
    base = ways.get("stock", ways[next(iter(ways))])["longest"]
    labels = [
        f"{'at least ' if ways[name]['at_least'] else ''}{value:,} ({value / base:.1f} x)"
        for name, value in zip(names, values, strict=True)
    ]
    axes.bar_label(bars, labels=labels, padding=4, fontsize=9)
    axes.set_xlim(0, max(values) * 1.3)
    axes.set_xlabel(f"tokens that train in one rank with {result['limit']}")
    axes.set_title(f"Longest sequence ({result['device_name']}, {result['model']['name']})")
    axes.grid(alpha=0.3, axis="x")
    drawing.save(figure, path)


def main(
    model: Annotated[str, typer.Option(help="Name of a model, or its file.")] = "llama3-mini",
    memory_mib: Annotated[int, typer.Option(help="On a CPU: what a rank may take.")] = 256,
    chunks: Annotated[int, typer.Option(help="Pieces of MLPs and of the loss.")] = 16,
    start: Annotated[int, typer.Option(help="First length tried.")] = 512,
    most: Annotated[int, typer.Option(help="Last length tried.")] = 2**20,
    precision: Annotated[float, typer.Option(help="Where to stop, relative.")] = 0.1,
    seconds: Annotated[float, typer.Option(help="Longest run.")] = 240.0,
    only: Annotated[str, typer.Option(help="Names of ways, separated by ';'.")] = "",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int, typer.Option(help="Of the one rank, on a CPU.")] = 2,
    output: Annotated[Path | None, typer.Option(help="Write JSON here, and a PNG beside.")] = None,
    work: Annotated[Path, typer.Option(help="Folder for corpus and reports.")] = Path(
        "runs/bench/max_length"
    ),
) -> None:
    """Search and print; see the text at the top of this file."""
    _, found_device = ranks_and_device(device, (1,))
    here = prepare(
        found_device, model, None, "stdlib", work, None, float("inf"), seconds, Console(stderr=True)
    )
    environment = {"OMP_NUM_THREADS": str(threads), **BLOCKS_RETURNED}
    trainer = replace(here.trainer, environment=environment)
    on_cpu = found_device == "cpu"
    cap = memory_mib if on_cpu else 0
    rows: dict[str, Any] = {}
    for name, way in ways_of(1, chunks, here.kernel).items():
        if (only and name not in only.split(";")) or (way.gpu and on_cpu):
            continue

        def attempt(length: int, name: str = name, way: Any = way) -> tuple[str, float | None]:
            training = here.training(length, STEPS, {})
            row = described(way, trainer.run(way, training, lambda line: None, cap_mib=cap))
            took = row.get("seconds")
            told = f" {took:.2f} s/step" if took is not None else ""
            print(f"{name}, {length} tokens: {row['status']}{told}", flush=True)
            return row["status"] if row["status"] != "error" else row["why"], took

        found = search(attempt, start=start, unit=256, most=most, precision=precision)
        rows[name] = {
            "longest": found.tokens,
            "at_least": found.at_least,
            "seconds_per_step_there": found.seconds,
            "tries": {str(length): status for length, status in sorted(found.tries.items())},
        }
    where = here.trainer.machine.name
    limit = f"{memory_mib} MiB to take" if cap else f"the memory of one {where}"
    result = {
        **here.result("max_length", chunks=chunks, precision=precision),
        "limit": limit,
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
        result_file.write(result, output)
        plot(result, output.with_suffix(".png"))
        print(f"{output}\n{output.with_suffix('.png')}")


if __name__ == "__main__":
    typer.run(main)
