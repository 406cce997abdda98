# SPDX-License-Identifier: Apache-2.0
"""Peak memory and step time of every way to spend memory, over the sequence length.

    python benchmarks/memory.py --output benchmarks/results/memory.json

Each way trains the same model on the same text through the launcher, on one rank and on two.
Memory is measured twice: the high-water mark of the process beyond what it had before the model was
built, and, on one rank and in a run of its own, the peak of torch's allocator within a step. Times
are medians of the steps after the first; ratios are of the same round. Without Transformer Engine
stock attention is unfused and holds an s x s matrix a head: it is left out where that would not
fit. All others use one flash kernel, so that what differs is recomputation and pieces alone.
"""

from __future__ import annotations

import os
import statistics
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
import machine
import memory_plot
from memory_ways import MIB, Outcome, Way, figures, run, unfused_gib, ways

from megatron_seqpar.data import StandardLibrary, prepare_corpus
from megatron_seqpar.mfu import read_flags
from megatron_seqpar.quickstart.machine import Machine, look
from megatron_seqpar.quickstart.plan import Training

ROOT = Path(__file__).resolve().parents[1]
BASE = "none"
REPEATED = "full recompute"


def _left_out(way: Way, here: Machine, model: Path, length: int, limit: float) -> str | None:
    """Why a way is not run, None where it is."""
    if way.gpu and here.device == "cpu":
        return "needs a GPU: on a CPU there is no other memory to put things in"
    if way.stock and here.ranks > 1:
        return "stock context parallelism needs Transformer Engine"
    if way.stock and not here.has_transformer_engine:
        needed = unfused_gib(model, length, full="--recompute-granularity" in way.arguments)
        if needed > limit:
            return f"unfused attention needs about {needed:.0f} GiB"
    return None


def _row(name: str, outcome: Outcome, accounted: Outcome | None) -> dict[str, Any]:
    if outcome.status != "ok":
        return {"status": outcome.status, "why": outcome.text}
    row = {"status": "ok", **figures(outcome)}
    if accounted is not None:
        if accounted.account is None:
            raise SystemExit(f"{name}: the account of torch's allocator failed:\n{accounted.text}")
        row["allocator_peak_bytes"] = accounted.account
    return row


def _summary(rounds: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Medians over rounds, and ratios within them, by way."""
    rows: dict[str, dict[str, Any]] = {}
    for name in rounds[0]:
        mine = [each[name] for each in rounds]
        failed = next((row for row in mine if row["status"] != "ok"), None)
        if failed is not None:
            rows[name] = failed
            continue
        keys = [key for key in mine[0] if key not in ("status", "losses")]
        rows[name] = {"status": "ok"}
        rows[name] |= {key: statistics.median(row[key] for row in mine) for key in keys}
        for label, other in (("none", BASE), ("full_recompute", REPEATED)):
            pairs = [(row, each[other]) for row, each in zip(mine, rounds, strict=True)]
            if any(base["status"] != "ok" for _, base in pairs):
                continue
            rows[name][f"time_over_{label}"] = statistics.median(
                row["seconds"] / base["seconds"] for row, base in pairs
            )
            if label == "none":
                rows[name]["largest_loss_difference_from_none"] = max(
                    abs(a - b) / abs(b)
                    for row, base in pairs
                    for a, b in zip(row["losses"], base["losses"], strict=True)
                )
    return rows


def _table(by_ranks: dict[str, dict[str, Any]]) -> Table:
    table = Table(title="Memory and time (medians)")
    for column in (
        "ranks", "tokens", "way", "s/step", "time / none", "time / full", "peak since start, MiB",
        "allocator's peak, MiB",
    ):  # fmt: skip
        table.add_column(column, justify="left" if column == "way" else "right")
    for ranks, by_length in by_ranks.items():
        for length, cell in by_length.items():
            for name, row in cell["ways"].items():
                if row["status"] != "ok":
                    table.add_row(ranks, f"{int(length):,}", name, row["status"])
                    continue
                allocator = row.get("allocator_peak_bytes")
                table.add_row(
                    ranks,
                    f"{int(length):,}",
                    name,
                    f"{row['seconds']:.2f}",
                    *(f"{row[k]:.3f}" if k in row else "" for k in ("time_over_none",)),
                    *(f"{row[k]:.3f}" if k in row else "" for k in ("time_over_full_recompute",)),
                    f"{row['memory_since_start_bytes'] / MIB:,.0f}",
                    "" if allocator is None else f"{allocator / MIB:,.0f}",
                )
            for name, why in cell["left_out"].items():
                table.add_row(ranks, f"{int(length):,}", name, f"left out: {why}")
            table.add_section()
    return table


def main(
    tokens: Annotated[str, typer.Option(help="Sequence lengths, comma separated.")] = (
        "2048,4096,8192,16384"
    ),
    ranks: Annotated[str, typer.Option(help="Sizes of the axis, comma separated.")] = "1,2",
    rounds: Annotated[int, typer.Option(min=1)] = 1,
    steps: Annotated[int, typer.Option(min=2, help="Steps of a run; the first is untimed.")] = 5,
    pieces: Annotated[int, typer.Option(min=1, help="Of MLPs and of the loss.")] = 8,
    model: Annotated[Path, typer.Option(help="Model file.")] = (
        ROOT / "configs" / "models" / "llama3-mini.yaml"
    ),
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    stock_limit_gib: Annotated[float, typer.Option(help="Leave unfused attention out above.")] = 6,
    output: Annotated[Path | None, typer.Option(help="Write JSON here, and a PNG beside.")] = None,
    work: Annotated[Path, typer.Option(help="Folder for corpus and reports.")] = Path(
        "runs/benchmark"
    ),
) -> None:
    """Measure and print; see the text at the top of this file."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    corpus = prepare_corpus(StandardLibrary(), work / "stdlib")
    by_ranks: dict[str, dict[str, Any]] = {}
    for size in (int(text) for text in ranks.split(",")):
        here = look(device, size)
        by_length: dict[str, Any] = {}
        for length in (int(text) for text in tokens.split(",")):
            training = Training(model, corpus, work / "cache", steps, length, batch=1)
            short = Training(model, corpus, work / "cache", 2, length, batch=1)
            left_out, measured = {}, []
            for number in range(rounds):
                cell = {}
                for name, way in ways(pieces).items():
                    why = _left_out(way, here, model, length, stock_limit_gib)
                    if why is not None:
                        left_out[name] = why
                        continue
                    outcome = run(name, way, training, here, work / "memory")
                    accounted = None
                    wanted = number == 0 and here.device == "cpu" and not by_ranks
                    if wanted and outcome.status == "ok":
                        accounted = run(name, way, short, here, work / "account", accounted=True)
                    cell[name] = _row(name, outcome, accounted)
                    if number and cell[name]["status"] == "ok":
                        first = measured[0][name].get("allocator_peak_bytes")
                        cell[name] |= {"allocator_peak_bytes": first} if first else {}
                    told = cell[name].get("seconds", outcome.text)
                    print(
                        f"{size} ranks, {length} tokens, {name}: {outcome.status} {told}",
                        flush=True,
                    )
                measured.append(cell)
            by_length[str(length)] = {"ways": _summary(measured), "left_out": left_out}
        by_ranks[str(size)] = by_length
    result = {
        **machine.describe(),
        "device": here.name,
        "model": read_flags(model),
        "pieces": pieces,
        "by_ranks": by_ranks,
    }
    Console(width=150).print(_table(by_ranks))
    if output is not None:
        machine.write(result, output)
        memory_plot.memory(result, output.with_suffix(".png"))
        print(f"{output}\n{output.with_suffix('.png')}")


if __name__ == "__main__":
    typer.run(main)
