# SPDX-License-Identifier: Apache-2.0
"""Every schedule side by side, forward + backward, on gloo ranks of one thread each.

    python benchmarks/schedules.py --output benchmarks/results/schedules.json

Every round measures all schedules one after the other in the same processes, with the same kernel
and the same tensors, so ratios of a round are of one moment of the machine; medians of those are
reported. With more ranks than cores the ranks share them: what one leaves idle another uses, and
the ratios then tell of messages, merges and kernel calls, not of idle time.
"""

from __future__ import annotations

import os
import statistics
import sys
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import typer
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
import attention
import machine

from megatron_seqpar.attention import ProcessGroupTransport, build_schedule

REFERENCE = "balanced"


def _ways(size: int) -> dict[str, dict[str, Any]]:
    """What is measured: a label and the options of the call."""
    ways: dict[str, dict[str, Any]] = {
        name: {"schedule": name}
        for name in (REFERENCE, "zigzag", "ring", "allgather", "ulysses", "solver")
    }
    ways["zigzag, zigzag tokens"] = {"schedule": "zigzag", "token_layout": "zigzag"}
    if size == 4:
        for name in ("ulysses+balanced", "allgather+zigzag"):
            ways[name] = {"schedule": name, "node_size": 2}
    return ways


def _rank(
    rank: int, size: int, port: int, lengths: list[int], rounds: int, sizes: dict, results: Any
) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=size)
    assert dist.group.WORLD is not None
    transport = ProcessGroupTransport(dist.group.WORLD)
    for length in lengths:
        ways = {
            name: attention.step(
                length // size, **sizes, group=transport, seq_length=length, **options
            )
            for name, options in _ways(size).items()
        }
        for warm_up in ways.values():
            attention.seconds_of(warm_up)
        for number in range(rounds):
            # not always in the same order: what runs after a slow one would be favoured
            at = number % len(ways)
            names = [*list(ways)[at:], *list(ways)[:at]]
            row = {name: attention.seconds_of(ways[name]) for name in names}
            if rank == 0:
                print(f"P={size}, {length} tokens, round {number + 1}/{rounds}", flush=True)
                results.append((size, length, row))
    dist.destroy_process_group()


def _summary(size: int, length: int, rows: list[dict[str, float]], sizes: dict) -> dict[str, Any]:
    summary = {}
    for name, options in _ways(size).items():
        zigzag = "token_layout" in options
        plan = build_schedule(
            options["schedule"],
            layout=attention.layout_of(size, length, zigzag=zigzag),
            query_heads=sizes["heads"],
            kv_heads=sizes["kv_heads"],
            head_dim=sizes["dim"],
            node_size=options.get("node_size"),
        )
        both = ("forward", "backward")
        summary[name] = {
            "seconds": statistics.median(row[name] for row in rows),
            f"over_{REFERENCE}": statistics.median(row[name] / row[REFERENCE] for row in rows),
            "idle_fraction": plan.idle_fraction,
            "mib_a_rank": sum(plan.bytes_sent(r, d, "float32") for r in range(size) for d in both)
            / size
            / 2**20,
            "tiles_a_rank": sum(len(s.tiles) for steps in plan.plan for s in steps) / size,
        }
    return summary


def _plot(result: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.6), layout="constrained")
    panels = figure.subplots(1, len(result["by_size"]), sharey=True, squeeze=False)[0]
    for axes, (size, by_length) in zip(panels, result["by_size"].items(), strict=True):
        lengths = [int(length) for length in by_length]
        for name in next(iter(by_length.values())):
            ratios = [row[name][f"over_{REFERENCE}"] for row in by_length.values()]
            axes.plot(lengths, ratios, marker="o", markersize=4, label=name)
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.set_title(f"P = {size} gloo ranks on {result['cores']} cores", fontsize=10)
        axes.set_xlabel("tokens")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    panels[0].set_ylabel(f"time / time of {REFERENCE}")
    figure.suptitle("Causal attention by schedule, forward + backward, same kernel, medians")
    figure.savefig(path, dpi=130)


def main(
    tokens: Annotated[str, typer.Option(help="Sequence lengths, comma separated.")] = (
        "2048,4096,8192,16384"
    ),
    ranks: Annotated[str, typer.Option(help="Numbers of ranks, comma separated.")] = "2,4",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds at each length.")] = 3,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 64,
    output: Annotated[Path | None, typer.Option(help="Write JSON here, and a PNG beside.")] = None,
) -> None:
    """Measure and print; see the text at the top of this file."""
    lengths = [int(t) for t in tokens.split(",")]
    sizes = {"heads": heads, "kv_heads": kv_heads, "dim": dim}
    by_size: dict[str, Any] = {}
    for size in map(int, ranks.split(",")):
        with mp.Manager() as manager:
            results = manager.list()
            port = 20000 + (os.getpid() + size) % 20000
            mp.spawn(_rank, args=(size, port, lengths, rounds, sizes, results), nprocs=size)
            measured = list(results)
        by_size[str(size)] = {
            str(length): _summary(
                size, length, [row for _, at, row in measured if at == length], sizes
            )
            for length in lengths
        }
    result = {**machine.describe(), "dtype": "float32", **sizes, "by_size": by_size}
    for size, by_length in by_size.items():
        table = Table(title=f"P = {size}: time over {REFERENCE}'s (seconds), medians")
        for column in ("schedule", *(f"{int(length):,}" for length in by_length), "idle", "MiB"):
            table.add_column(column, justify="left" if column == "schedule" else "right")
        for name in next(iter(by_length.values())):
            rows = [row[name] for row in by_length.values()]
            table.add_row(
                name,
                *(f"{r[f'over_{REFERENCE}']:.2f} ({r['seconds']:.2f})" for r in rows),
                f"{100 * rows[-1]['idle_fraction']:.0f}%",
                f"{rows[-1]['mib_a_rank']:.0f}",
            )
        Console(width=130).print(table)
    if output is not None:
        machine.write(result, output)
        _plot(result, output.with_suffix(".png"))
        print(f"{output}\n{output.with_suffix('.png')}")


if __name__ == "__main__":
    typer.run(main)
