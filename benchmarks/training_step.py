# SPDX-License-Identifier: Apache-2.0
"""A training step of Megatron's own loop: SP=2 against one rank and against tensor parallelism.

    python benchmarks/training_step.py --output benchmarks/results/training_step.json

Each way trains the same small Llama-shaped model on the same text through the launcher, one thread
a rank. A round runs all ways of a length one after the other; a way's step time is the median of
its steps after the first, and ratios are medians of the rounds' ratios. Ways named "stock" use
Megatron's own attention, which without Transformer Engine is unfused and holds an s x s matrix a
head: it is left out where it would not fit, and said so. All others use one flash kernel.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
import machine

from megatron_seqpar.data import StandardLibrary, prepare_corpus
from megatron_seqpar.quickstart.machine import Machine
from megatron_seqpar.quickstart.plan import Run, Training
from megatron_seqpar.quickstart.runs import launch_command

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20


@dataclass(frozen=True)
class Way:
    """One way to train: ranks and arguments; `stock` attention is unfused on the CPU."""

    ranks: int
    arguments: tuple[str, ...]
    stock: bool = False


_KERNEL = ("--seqpar-kernel", "cpu")
_TP = ("--tensor-model-parallel-size", "2")
WAYS = {
    "SP=2": Way(2, ("--sequence-parallel-size", "2", *_KERNEL)),
    "SP=1": Way(1, _KERNEL),
    "TP=2": Way(2, (*_TP, *_KERNEL)),
    "TP=2 + TP-SP": Way(2, (*_TP, "--sequence-parallel", *_KERNEL)),
    "SP=1, stock": Way(1, (), stock=True),
    "TP=2, stock": Way(2, _TP, stock=True),
    "TP=2 + TP-SP, stock": Way(2, (*_TP, "--sequence-parallel"), stock=True),
}


def _run(name: str, way: Way, training: Training, folder: Path) -> dict[str, Any]:
    here = Machine("cpu", "cpu", way.ranks)
    run = Run(name, name, "", way.ranks, (*training.arguments(), *way.arguments))
    report = folder / "report.json"
    report.unlink(missing_ok=True)
    done = subprocess.run(
        launch_command(run, here, ROOT / "scripts" / "pretrain_gpt.py", report),
        env={**here.environment(), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(f"{name} failed:\n{(done.stdout + done.stderr)[-3000:]}")
    content = json.loads(report.read_text())
    grown = max(r["peak_memory_bytes"] - r["start_memory_bytes"] for r in content["ranks"])
    return {
        "seconds": content["summary"]["seconds_per_step"],
        "tokens_per_second": content["summary"]["tokens_per_second"],
        "peak_memory_bytes": content["summary"]["peak_memory_bytes"],
        "memory_since_start_bytes": grown,
        "bytes_sent_per_rank_and_step": content["summary"]["bytes_sent_per_rank_and_step"],
        "losses": [step["loss"] for step in content["steps"]],
    }


def _unfused_gib(length: int, heads: int) -> float:
    """Score, probability and gradient matrices of one layer's unfused attention, all ranks."""
    return 5 * heads * length * length * 4 / 2**30


def _summary(rounds: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for name in rounds[0]:
        mine = [r[name] for r in rounds]
        keys = ("seconds", "tokens_per_second", "peak_memory_bytes", "memory_since_start_bytes")
        rows[name] = {key: statistics.median(row[key] for row in mine) for key in keys}
        rows[name]["bytes_sent_per_rank_and_step"] = mine[0]["bytes_sent_per_rank_and_step"]
        rows[name]["time_over_sp2"] = statistics.median(
            r[name]["seconds"] / r["SP=2"]["seconds"] for r in rounds
        )
        rows[name]["largest_loss_difference_from_sp1"] = max(
            abs(a - b) / abs(b)
            for r in rounds
            for a, b in zip(r[name]["losses"], r["SP=1"]["losses"], strict=True)
        )
    half = statistics.median(2 * r["SP=2"]["seconds"] / r["SP=1"]["seconds"] for r in rounds)
    return {"sp2_over_half_of_sp1": half, "ways": rows}


def _plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    lengths = [int(length) for length in result["by_length"]]
    for name, way in WAYS.items():
        rows = {
            int(length): row["ways"][name]
            for length, row in result["by_length"].items()
            if name in row["ways"]
        }
        style = {"marker": "o", "label": name, "linestyle": "--" if way.stock else "-"}
        left.plot(list(rows), [row["tokens_per_second"] for row in rows.values()], **style)
        memory = [row["memory_since_start_bytes"] / MIB for row in rows.values()]
        right.plot(list(rows), memory, **style)
    left.set_ylabel("tokens/s")
    right.set_ylabel("peak memory a rank since the start, MiB")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.set_xlabel("tokens a sequence")
        axes.grid(alpha=0.3)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8)
    figure.suptitle("Training step on two CPU cores, one thread a rank, fp32")
    figure.savefig(path, dpi=140)


def main(
    tokens: Annotated[str, typer.Option(help="Sequence lengths, comma separated.")] = (
        "2048,4096,8192,16384"
    ),
    rounds: Annotated[int, typer.Option(min=1)] = 2,
    steps: Annotated[
        int, typer.Option(min=2, help="Steps of each run; the first is not timed.")
    ] = 4,
    model: Annotated[Path, typer.Option(help="Model file.")] = (
        ROOT / "configs" / "models" / "benchmark.yaml"
    ),
    stock_limit_gib: Annotated[
        float, typer.Option(help="Leave unfused attention out above this, all ranks together.")
    ] = 12.0,
    output: Annotated[Path | None, typer.Option(help="Write JSON here, and a PNG beside.")] = None,
    work: Annotated[Path, typer.Option(help="Folder for corpus and reports.")] = Path(
        "runs/benchmark"
    ),
) -> None:
    """Measure and print; see the text at the top of this file."""
    from megatron_seqpar.mfu import read_flags

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    corpus = prepare_corpus(StandardLibrary(), work / "stdlib")
    heads = int(read_flags(model)["num-attention-heads"])
    by_length: dict[str, Any] = {}
    for length in (int(t) for t in tokens.split(",")):
        training = Training(model, corpus, work / "cache", steps, length, batch=1)
        skipped = {
            name: f"unfused attention needs about {_unfused_gib(length, heads):.0f} GiB"
            for name, way in WAYS.items()
            if way.stock and _unfused_gib(length, heads) > stock_limit_gib
        }
        measured = []
        for number in range(rounds):
            row = {}
            for name, way in WAYS.items():
                if name in skipped:
                    continue
                row[name] = _run(name, way, training, work)
                print(
                    f"{length} tokens, round {number + 1}/{rounds}, {name}: "
                    f"{row[name]['seconds']:.2f} s/step",
                    flush=True,
                )
            measured.append(row)
        by_length[str(length)] = {**_summary(measured), "left_out": skipped}
    result = {**machine.describe(), "model": read_flags(model), "by_length": by_length}
    table = Table(title="Training step (medians)")
    for column in (
        "tokens", "way", "s/step", "tokens/s", "time / SP=2", "peak since start, MiB",
        "sent a rank, MiB", "loss vs SP=1",
    ):  # fmt: skip
        table.add_column(column, justify="left" if column == "way" else "right")
    for text, row in by_length.items():
        for name, way in row["ways"].items():
            table.add_row(
                f"{int(text):,}",
                name,
                f"{way['seconds']:.2f}",
                f"{way['tokens_per_second']:,.0f}",
                f"{way['time_over_sp2']:.3f}",
                f"{way['memory_since_start_bytes'] / MIB:,.0f}",
                f"{way['bytes_sent_per_rank_and_step'] / MIB:,.1f}",
                f"{way['largest_loss_difference_from_sp1']:.1e}",
            )
        for name, why in row["left_out"].items():
            table.add_row(f"{int(text):,}", name, "left out:", why)
        table.add_section()
    Console(width=130).print(table)
    for text, row in by_length.items():
        print(f"{int(text):,} tokens: SP=2 over half of SP=1: {row['sp2_over_half_of_sp1']:.3f}")
    if output is not None:
        machine.write(result, output)
        _plot(result, output.with_suffix(".png"))
        print(f"{output}\n{output.with_suffix('.png')}")


if __name__ == "__main__":
    typer.run(main)
