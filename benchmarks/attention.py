# SPDX-License-Identifier: Apache-2.0
"""Distributed attention on two gloo ranks, one thread each, against one rank: forward + backward.

    python benchmarks/attention.py --output benchmarks/results/attention.json

Every round measures, one after the other: one rank with the whole sequence while the other rests;
the same on both at once, each for itself (cores share caches and memory, so this is slower); two
ranks `balanced`; the same without overlap; two ranks `ring`. Ratios are taken in a round and
their medians reported, so that a machine whose speed drifts does not decide. `efficiency` is the
one-rank time over twice the two-rank time: 1 means that splitting costs nothing; its second form
takes the one-rank time on the busy machine, which leaves out what the cores cost each other.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
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
import machine

from megatron_seqpar.attention import (
    LocalTransport,
    ProcessGroupTransport,
    TokenLayout,
    dist_flash_attention,
)

Step = Callable[[], None]


def step(tokens: int, heads: int, kv_heads: int, dim: int, **options: Any) -> Step:
    """One forward and backward pass over `tokens` local tokens."""
    q, k, v = (torch.randn(1, tokens, h, dim).requires_grad_() for h in (heads, kv_heads, kv_heads))
    dout = torch.randn(1, tokens, heads, dim)

    def run() -> None:
        out = dist_flash_attention(q, k, v, **options)
        assert isinstance(out, torch.Tensor)
        out.backward(dout)
        q.grad = k.grad = v.grad = None

    return run


def layout_of(size: int, length: int, *, zigzag: bool) -> TokenLayout:
    """Who owns which tokens."""
    if zigzag:
        return TokenLayout.zigzag(size, length)
    return TokenLayout.contiguous(size, seq_length=length)


def seconds_of(run: Step) -> float:
    """Time until all ranks are done."""
    dist.barrier()
    start = time.perf_counter()
    run()
    dist.barrier()
    return time.perf_counter() - start


def _alone(run: Step) -> float:
    """Time of rank 0 alone; the other rank sleeps until it is done."""
    start = time.perf_counter()
    if dist.get_rank() == 0:
        run()
    seconds = torch.tensor(time.perf_counter() - start)
    dist.broadcast(seconds, 0)
    return seconds.item()


def _rank(rank: int, port: int, lengths: list[int], rounds: int, sizes: dict, results: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    assert dist.group.WORLD is not None
    transport = ProcessGroupTransport(dist.group.WORLD)
    for length in lengths:
        whole = step(length, **sizes, group=LocalTransport())
        ways = {
            "balanced": step(length // 2, **sizes, group=transport, schedule="balanced"),
            "no_overlap": step(
                length // 2, **sizes, group=transport, schedule="balanced", overlap=False
            ),
            "ring": step(length // 2, **sizes, group=transport, schedule="ring"),
        }
        for warm_up in ways.values():
            seconds_of(warm_up)
        for number in range(rounds):
            row = {"one_rank": _alone(whole), "one_rank_busy": seconds_of(whole)}
            row |= {name: seconds_of(run) for name, run in ways.items()}
            if rank == 0:
                shown = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in row.items())
                print(f"{length} tokens, round {number + 1}/{rounds}: {shown}", flush=True)
                results.append((length, row))
    dist.destroy_process_group()


def _summary(rounds: list[dict[str, float]]) -> dict[str, Any]:
    def median(ratio: Callable[[dict[str, float]], float]) -> float:
        return round(statistics.median(ratio(row) for row in rounds), 4)

    return {
        "seconds": {k: statistics.median(row[k] for row in rounds) for k in rounds[0]},
        "efficiency": median(lambda r: r["one_rank"] / (2 * r["balanced"])),
        "efficiency_busy": median(lambda r: r["one_rank_busy"] / (2 * r["balanced"])),
        "efficiency_ring": median(lambda r: r["one_rank"] / (2 * r["ring"])),
        "ring_over_balanced": median(lambda r: r["ring"] / r["balanced"]),
        "no_overlap_over_overlap": median(lambda r: r["no_overlap"] / r["balanced"]),
        "rounds": rounds,
    }


def _plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = result["by_length"]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    lengths = [int(length) for length in rows]
    for key, label in (
        ("efficiency", "balanced"),
        ("efficiency_busy", "balanced, against one rank on a busy machine"),
        ("efficiency_ring", "ring"),
    ):
        axes.plot(lengths, [row[key] for row in rows.values()], marker="o", label=label)
    axes.axhline(1, color="grey", linewidth=1, linestyle="--")
    axes.axhline(2 / 3, color="grey", linewidth=1, linestyle=":")
    axes.text(lengths[0], 2 / 3, " ring's bound, 2/3", va="bottom", color="grey")
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.set_ylim(0, 1.15)
    axes.set_xlabel("tokens")
    axes.set_ylabel("one-rank time / (2 x two-rank time)")
    axes.set_title("Causal attention, forward + backward, two gloo ranks of one thread")
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=140)


def main(
    tokens: Annotated[str, typer.Option(help="Sequence lengths, comma separated.")] = (
        "4096,8192,16384"
    ),
    rounds: Annotated[int, typer.Option(min=1, help="Rounds at each length.")] = 5,
    heads: int = 8,
    kv_heads: int = 2,
    dim: int = 64,
    output: Annotated[Path | None, typer.Option(help="Write JSON here, and a PNG beside.")] = None,
) -> None:
    """Measure and print; see the text at the top of this file."""
    lengths = [int(t) for t in tokens.split(",")]
    sizes = {"heads": heads, "kv_heads": kv_heads, "dim": dim}
    with mp.Manager() as manager:
        results = manager.list()
        port = 20000 + os.getpid() % 20000
        mp.spawn(_rank, args=(port, lengths, rounds, sizes, results), nprocs=2)
        measured = list(results)
    by_length = {
        str(length): _summary([row for at, row in measured if at == length]) for length in lengths
    }
    result = {**machine.describe(), "dtype": "float32", **sizes, "by_length": by_length}
    table = Table(title="Two ranks against one (medians)")
    columns = (
        "efficiency",
        "efficiency_busy",
        "efficiency_ring",
        "ring_over_balanced",
        "no_overlap_over_overlap",
    )
    for column in ("tokens", "one rank, s", "balanced, s", *columns):
        table.add_column(column.replace("_", " "), justify="right")
    for length, row in by_length.items():
        seconds = row["seconds"]
        table.add_row(
            f"{int(length):,}", f"{seconds['one_rank']:.2f}", f"{seconds['balanced']:.2f}",
            *(f"{row[c]:.3f}" for c in columns),
        )  # fmt: skip
    Console(width=130).print(table)
    if output is not None:
        machine.write(result, output)
        _plot(result, output.with_suffix(".png"))
        print(f"{output}\n{output.with_suffix('.png')}")


if __name__ == "__main__":
    typer.run(main)
