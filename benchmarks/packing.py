# SPDX-License-Identifier: Apache-2.0
"""Packed documents: idle time and bytes of `solver` against padding zigzag and a contiguous ring.

    python benchmarks/packing.py --output benchmarks/results/packing.json

A window of 131,072 tokens is filled with documents of log-normal length; the last is cut off where
the window ends. Everything is counted, nothing is timed but the planning. Compared are

    solver    contiguous chunks of the window as it is, `schedules/solver`;
    zigzag    every document padded to a multiple of 2P tokens and cut into 2P parts, of which rank
              r owns parts r and 2P-1-r, keys and values round a ring: context parallelism on packed
              (thd) input as in Megatron-LM with Transformer Engine;
    ring      contiguous chunks of the window as it is, keys and values round a ring.

How it is counted:

    idle      1 - pairs / (P x sum over steps of the busiest rank's pairs), pairs being interacting
              (query, key) pairs of real tokens. Padded tokens take part in zigzag's computation
              (all its ranks have the same work), so pairs with a padded token are idle time.
    blocks    the same in kernel blocks: FlashAttention computes 128 x 128 pairs at a time, so a
              tile of 20 x 20 costs a block as well. 1 - blocks of the documents on one device /
              (P x sum over steps of the busiest rank's blocks): 0 is one device's efficiency.
    padding   padded tokens over real ones: they pass through every layer, not only attention.
    bytes     sent by all ranks, forward and backward, bfloat16. Zigzag passes all keys and values
              on P-1 times in either pass, and their gradients in the backward pass; the contiguous
              ring here passes keys and values on in the same way, but returns gradients directly
              and only from where there are any.
    tiles     most blocks of attention that a rank computes; zigzag does those of a step in one
              call of a kernel for variable lengths.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from megatron_seqpar.attention import Documents, Payload, Schedule, TokenLayout
from megatron_seqpar.attention.ir import Problem, Tile
from megatron_seqpar.attention.schedules import ring, solver
from megatron_seqpar.bench import result as result_file

TOKENS = 131072
BLOCK = 128
SHAPES = {"typical": (2048, 1.4), "long tail": (1024, 2.2)}  # median, sigma of log length
WAYS = ("solver", "zigzag", "ring")


def packing(median: int, sigma: float, seed: int) -> tuple[int, ...]:
    """Lengths of documents that fill the window."""
    random, lengths = np.random.default_rng(seed), []
    left = TOKENS
    while left:
        length = min(left, max(16, int(random.lognormal(math.log(median), sigma))))
        lengths.append(length)
        left -= length
    return tuple(lengths)


def blocks(rows: int, columns: int, low: int | None = None, high: int | None = None) -> int:
    """Kernel blocks of a tile that hold a pair; row i sees columns low <= j - i <= high."""
    total = 0
    for first in range(0, rows, BLOCK):
        last = min(first + BLOCK, rows) - 1
        begin = 0 if low is None else max(0, first + low)
        end = columns if high is None else min(columns, last + high + 1)
        total += max(0, -(-end // BLOCK) - begin // BLOCK)
    return total


def tile_blocks(tile: Tile) -> int:
    """Kernel blocks of a schedule's tile."""
    shift = tile.q.start - tile.kv.start
    low, high = (None if cut is None else cut + shift for cut in (tile.low, tile.high))
    return blocks(tile.q.size, tile.kv.size, low, high)


def of_schedule(plan: Schedule, one_device: int) -> dict[str, float]:
    """Idle fractions and bytes of a schedule."""
    critical = sum(
        max(sum(map(tile_blocks, step.tiles)) for step in steps)
        for steps in zip(*plan.plan, strict=True)
    )
    ranks = range(plan.size)
    sent = [plan.bytes_sent(r, "forward") + plan.bytes_sent(r, "backward") for r in ranks]
    return {
        "idle": plan.idle_fraction,
        "blocks": 1 - one_device / (plan.size * critical),
        "padding": 0.0,
        "gigabytes": sum(sent) / 1e9,
        "busiest_gigabytes": max(sent) / 1e9,
        "tiles": max(sum(len(step.tiles) for step in plan.steps(r)) for r in ranks),
        "messages": max(plan.messages_sent(r, "forward") for r in ranks),
        "steps": len(plan.plan[0]),
    }


def of_zigzag(lengths: Sequence[int], problem: Problem, one_device: int) -> dict[str, float]:
    """The same for zigzag per document with padding: every rank works alike at every step."""
    size = problem.size
    parts = [-(-length // (2 * size)) for length in lengths]  # tokens of a part
    padded = sum(2 * size * part for part in parts)
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    padded_pairs = sum(2 * size * part * (2 * size * part + 1) // 2 for part in parts)
    # step 0: both own parts, causal; then both own parts x another's early part, or the late one x
    # both of another's
    critical = sum(blocks(2 * part, 2 * part, None, 0) for part in parts)
    critical += (size - 1) * sum(blocks(2 * part, part) for part in parts)
    payloads = (Payload.KV, Payload.KV, Payload.DKV)
    sent = (size - 1) * sum(
        problem.payload_bytes(payload, padded, problem.kv_heads, 2) for payload in payloads
    )
    return {
        "idle": 1 - pairs / padded_pairs,
        "blocks": 1 - one_device / (size * critical),
        "padding": padded / TOKENS - 1,
        "gigabytes": sent / 1e9,
        "busiest_gigabytes": sent / size / 1e9,
        "tiles": size * len(lengths),
        "messages": 2 * (size - 1),
        "steps": size,
    }


def measure(lengths: tuple[int, ...], size: int, heads: int, kv_heads: int) -> dict[str, Any]:
    """One packing under all ways."""
    ends = np.cumsum([0, *lengths]).tolist()
    problem = Problem(
        TokenLayout.contiguous(size, seq_length=TOKENS), Documents(tuple(ends)), heads, kv_heads,
        node_size=size,
    )  # fmt: skip
    begin = time.process_time()
    placement = solver.place(problem)
    seconds = time.process_time() - begin
    one_device = sum(blocks(length, length, None, 0) for length in lengths)
    return {
        "documents": len(lengths),
        "planning_ms": 1000 * seconds,
        "solver": of_schedule(Schedule.of("solver", problem, placement), one_device),
        "zigzag": of_zigzag(lengths, problem, one_device),
        "ring": of_schedule(Schedule.of("ring", problem, ring.place(problem)), one_device),
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean, median and worst of every number."""

    def of(values: list[float]) -> dict[str, float]:
        return {
            "mean": round(statistics.fmean(values), 5),
            "median": round(statistics.median(values), 5),
            "worst": round(max(values), 5),
        }

    found: dict[str, Any] = {
        key: of([row[key] for row in rows]) for key in ("documents", "planning_ms")
    }
    for way in WAYS:
        found[way] = {key: of([row[way][key] for row in rows]) for key in rows[0][way]}
    return found


def plot(cases: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Distributions over packings: one column a case, one row a number."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    numbers = {
        "idle": "idle fraction, in pairs",
        "blocks": "idle fraction, in kernel blocks",
        "gigabytes": "GB sent by all ranks",
    }
    labels = {
        "solver": "solver", "zigzag": "zigzag per document, padded", "ring": "contiguous ring"
    }  # fmt: skip
    figure, axes = pyplot.subplots(
        len(numbers), len(cases), figsize=(3.5 * len(cases), 7.5), layout="constrained", sharey=True
    )
    for column, (case, rows) in enumerate(cases.items()):
        for row, (number, label) in enumerate(numbers.items()):
            at = axes[row][column]
            for way in WAYS:
                values = sorted(r[way][number] for r in rows)
                share = np.arange(1, len(values) + 1) / len(values)
                at.step(values, share, where="post", label=labels[way])
            if number == "idle":
                at.set_xscale("log")
                at.set_xlim(1e-4, 1)
                at.axvline(0.02, color="grey", linewidth=1, linestyle=":")
            else:
                at.set_xlim(left=0)
            at.set_xlabel(label)
            at.grid(alpha=0.3)
            if row == 0:
                at.set_title(case)
            if column == 0:
                at.set_ylabel("share of packings below")
    lines, names = axes[0][0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside upper center", ncols=len(names))
    figure.savefig(path, dpi=130)


def main(
    packings: Annotated[int, typer.Option(min=1, help="Packings of each kind and size.")] = 200,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 32,
    kv_heads: Annotated[int, typer.Option(help="Key/value heads.")] = 8,
    output: Annotated[Path | None, typer.Option(help="Write JSON here, and a PNG beside.")] = None,
) -> None:
    """Count and print; see the text at the top of this file."""
    cases: dict[str, list[dict[str, Any]]] = {}
    for name, (median, sigma) in SHAPES.items():
        for size in (8, 16):
            cases[f"{name}, P = {size}"] = [
                measure(packing(median, sigma, seed), size, heads, kv_heads)
                for seed in range(packings)
            ]
    found = {case: summary(rows) for case, rows in cases.items()}
    table = Table(title=f"{packings} packings of {TOKENS:,} tokens each: mean / worst")
    for column in ("", "", "idle, %", "idle in blocks, %", "padding, %", "GB sent", "tiles", "planning, ms"):  # fmt: skip  # noqa: E501
        table.add_column(column, justify="left" if not column else "right")
    for case, of_case in found.items():
        for way in WAYS:
            row = of_case[way]
            cells = [
                f"{scale * row[key]['mean']:.{digits}f} / {scale * row[key]['worst']:.{digits}f}"
                for key, scale, digits in (
                    ("idle", 100, 2), ("blocks", 100, 1), ("padding", 100, 2),
                    ("gigabytes", 1, 2), ("tiles", 1, 0),
                )
            ]  # fmt: skip
            plan = of_case["planning_ms"]
            planning = f"{plan['median']:.1f} / {plan['worst']:.1f}" if way == "solver" else ""
            table.add_row(case if way == WAYS[0] else "", way, *cells, planning)
        table.add_section()
    Console(width=130).print(table)
    if output is not None:
        sizes = {"tokens": TOKENS, "packings": packings, "heads": heads, "kv_heads": kv_heads}
        shapes = {name: {"median": m, "sigma": s} for name, (m, s) in SHAPES.items()}
        result = {
            **result_file.describe(),
            **sizes,
            "head_dim": 128,
            "lengths": shapes,
            "cases": found,
        }
        result_file.write(result, output)
        plot(cases, output.with_suffix(".png"))
        print(f"{output}\n{output.with_suffix('.png')}")


if __name__ == "__main__":
    typer.run(main)
