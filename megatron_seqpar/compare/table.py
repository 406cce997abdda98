# SPDX-License-Identifier: Apache-2.0
"""The comparison as tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

MIB = 2**20


def cost_table(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    """One row a way; what failed says why."""
    table = Table(title=title)
    table.add_column("way", no_wrap=True)
    table.add_column("attention")
    for name in (
        "ranks",
        "loss, largest\ndifference",
        "s/step\n(spread)",
        "time /\nSP",
        "tokens/s",
        "MFU\n(causal)",
        "peak memory\na rank, MiB",
        "of it since\nstart, MiB",
        "sent a rank\nand step, MiB",
    ):
        table.add_column(name, justify="right")
    for row in rows:
        start = (row["label"], row["attention"], str(row["ranks"]))
        if row["status"] != "ok":
            table.add_row(*start, row["status"])  # why: below the table
            continue
        table.add_row(
            *start,
            _difference(row),
            f"{row['step_time_s']:.3f}\n({row['step_time_spread']:.0%})",
            "-" if row["time_over_sp"] is None else f"{row['time_over_sp']:.2f}",
            f"{row['tokens_per_s']:,.0f}",
            "-" if row["mfu"] is None else f"{row['mfu']:.1%}\n({row['causal_mfu']:.1%})",
            f"{row['peak_memory_bytes'] / MIB:,.0f}",
            f"{row['memory_since_start_bytes'] / MIB:,.0f}",
            f"{row['bytes_sent_per_step'] / MIB:,.1f}",
        )
    return table


def traffic_table(rows: Sequence[Mapping[str, Any]]) -> Table | None:
    """MiB that a rank sends a step, by kind of collective; None where nothing is sent."""
    done = [row for row in rows if row["status"] == "ok" and row["bytes_sent_per_step"]]
    kinds = sorted({kind for row in done for kind in row["bytes_by_kind"]})
    if not kinds:
        return None
    table = Table(title="Sent a rank and step, MiB, by kind")
    table.add_column("way", no_wrap=True)
    for kind in kinds:
        table.add_column(kind.replace("_", " "), justify="right")
    for row in done:
        cells = [row["bytes_by_kind"].get(kind) for kind in kinds]
        table.add_row(row["label"], *("-" if c is None else f"{c / MIB:,.2f}" for c in cells))
    return table


def _difference(row: Mapping[str, Any]) -> str:
    if row["reference"]:
        return "reference"
    if row["changes"]:
        return "other model"
    return "-" if row["loss_difference"] is None else f"{row['loss_difference']:.1e}"


def failures(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Why each way that failed did, one line a way."""
    return [
        f"{row['label']}: {row['status']}: {' '.join(row['reason'].split())[:300]}"
        for row in rows
        if row["status"] != "ok"
    ]


def longest_table(found: Mapping[str, Mapping[str, Any]], limit: str) -> Table:
    """The longest sequence of each way."""
    table = Table(title=f"Longest sequence that trains: {limit}")
    table.add_column("way", no_wrap=True)
    table.add_column("tokens", justify="right")
    for label, each in found.items():
        if each["tokens"] is None:
            table.add_row(label, each["why"])
        else:
            most = ">= " if each["at_least"] else ""
            table.add_row(label, f"{most}{each['tokens']:,}")
    return table


def loss_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One row a step: the loss of every way of one model, and the largest difference of two."""
    done = [row for row in rows if row["status"] == "ok" and not row["changes"]]
    table = Table(title="Loss of each step")
    table.add_column("step", justify="right")
    for row in done:
        table.add_column(row["label"], justify="right")
    table.add_column("largest\ndifference", justify="right")
    for number, losses in enumerate(zip(*(row["losses"] for row in done), strict=True), start=1):
        known = [loss for loss in losses if loss is not None]
        apart = (max(known) - min(known)) / abs(min(known)) if len(known) == len(losses) else None
        cells = ("-" if loss is None else f"{loss:.6f}" for loss in losses)
        table.add_row(str(number), *cells, "-" if apart is None else f"{apart:.1e}")
    return table
