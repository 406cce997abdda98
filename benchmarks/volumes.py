# SPDX-License-Identifier: Apache-2.0
"""Bytes that attention sends: `auto` by bytes against the published schedules, for P to 64.

    python -m benchmarks.volumes            # table, benchmarks/results/volumes.json and .png

Pure accounting on one core, no timing. What a published schedule sends is computed here from its
definition, not from this project's builders.
"""

from __future__ import annotations

import json
import math
import platform
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_seqpar.attention.schedules import explain, make_problem

HEADS, DIM, CHUNK = 32, 128, 64
GROUPS = (1, 2, 4, 8, 16, 32)
RESULTS = Path(__file__).parent / "results"


def published(
    size: int, kv_heads: int, *, chunk: int = CHUNK, heads: int = HEADS
) -> dict[str, float]:
    """Bytes of both passes, all ranks, bf16 under a causal mask; infinite where one does not apply.

    A token's query row on a Q-route moves q, and out with its LSE comes back; in backward it moves
    q, dout, LSE and delta, and dq comes back. A key row moves k and v, and in backward again, and
    dk and dv come back. Ulysses is counted in the same protocol.
    """
    q, kv, stat = 2 * heads * DIM, 2 * 2 * kv_heads * DIM, 4 * heads
    q_row = (q + q + stat) + (q + q + 2 * stat) + q
    kv_row = kv + kv + kv
    rows = float(chunk)
    # DISTFLASHATTN: tile (r, r-t) on the KV-route for r >= t, else on the Q-route
    kv_tiles = sum(size - t for t in range(1, (size - 1) // 2 + 1))
    q_tiles = sum(t for t in range(1, (size - 1) // 2 + 1))
    if size % 2 == 0:
        kv_tiles += size // 2
    everyone = size * (size - 1)
    # a KV head goes to every rank that has one of its query heads
    copies = max(1, size // kv_heads)
    ulysses = rows * (size - 1) * (q_row + kv_row * copies)
    return {
        "lightseq balanced": rows * (kv_tiles * kv_row + q_tiles * q_row),
        "ring": rows * everyone * kv_row,
        "all-gather": rows * everyone * kv_row,
        "direct zigzag": 0.75 * rows * everyone * kv_row,
        "ulysses": ulysses if heads % size == 0 else math.inf,
    }


def row(size: int, group: int) -> dict[str, Any]:
    """One cell of the table: what auto sends, and what the others do."""
    kv_heads = HEADS // group
    choice = explain(
        make_problem(
            size=size, seq_length=size * CHUNK, query_heads=HEADS, kv_heads=kv_heads, head_dim=DIM
        ),
        objective="bytes",
    )
    others = published(size, kv_heads)
    best = min(others, key=lambda name: others[name])
    sent = choice.candidates[0].bytes_total
    return {
        "P": size,
        "g": group,
        "auto": choice.schedule.name,
        "auto_bytes": sent,
        "best_published": best,
        "ratio": sent / others[best],
        "published_bytes": {n: (b if math.isfinite(b) else None) for n, b in others.items()},
    }


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Bytes a rank and token of the whole sequence over P, one panel a group size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7.5), layout="constrained")
    panels = figure.subplots(2, 3, sharex=True)
    for axes, group in zip(panels.flat, GROUPS, strict=True):
        of_group = [r for r in rows if r["g"] == group]
        sizes = [r["P"] for r in of_group]
        for name in of_group[0]["published_bytes"]:
            if name == "all-gather":
                continue  # as ring
            values = [r["published_bytes"][name] for r in of_group]
            shown = [(p, v / p / p / CHUNK) for p, v in zip(sizes, values, strict=True) if v]
            style = "o" if name == "ulysses" else "-"
            label = "ring, all-gather" if name == "ring" else name
            axes.plot(*zip(*shown, strict=True), style, label=label, linewidth=1.2, markersize=3)
        ours = [r["auto_bytes"] / r["P"] / r["P"] / CHUNK for r in of_group]
        axes.plot(sizes, ours, "k", linewidth=2, label="auto, by bytes")
        axes.set_title(f"g = {group} ({HEADS} query heads, {HEADS // group} KV heads)", fontsize=10)
        axes.set_yscale("log")
    for axes in panels[1]:
        axes.set_xlabel("ranks P")
    for axes in panels[:, 0]:
        axes.set_ylabel("bytes a rank sends / token of the sequence")
    panels[0, 0].legend(fontsize=8)
    figure.suptitle("Attention's bytes, forward and backward, causal, bf16, head dim 128")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Every P from 2 to 64 and every group size."""
    rows = []
    for size in range(2, 65):
        rows += [row(size, group) for group in GROUPS]
        print(f"P = {size}", file=sys.stderr, flush=True)
    table = Table(title="bytes of auto / least of the published schedules, and what auto took")
    table.add_column("P", justify="right")
    for group in GROUPS:
        table.add_column(f"g = {group}")
    for size in (2, 3, 4, 5, 7, 8, 12, 16, 24, 31, 32, 48, 63, 64):
        cells = [r for r in rows if r["P"] == size]
        table.add_row(str(size), *(f"{r['ratio']:.3f} {r['auto']}" for r in cells))
    Console(width=150).print(table)
    worst = max(rows, key=lambda r: r["ratio"])
    print(f"largest ratio: {worst['ratio']:.4f} at P = {worst['P']}, g = {worst['g']}")
    result = {
        "command": "python -m benchmarks.volumes",
        "python": platform.python_version(),
        "query_heads": HEADS,
        "head_dim": DIM,
        "tokens_a_rank": CHUNK,
        "largest_ratio": worst["ratio"],
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "volumes.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(rows, RESULTS / "volumes.png")


if __name__ == "__main__":
    main()
