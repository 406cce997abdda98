# SPDX-License-Identifier: Apache-2.0
"""What a sweep found: the best layouts, and what each choice changes by itself."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

MIB = 2**20
Rows = Sequence[Mapping[str, Any]]
FACTORS = ("micro_batch", "tp", "pp", "sp", "seq_parallel", "recompute", "zero", "schedule",
           "mlp_chunks", "loss_chunks", "kernel")  # fmt: skip
_PLAIN = ("none", "auto", "off", "unfused")
_GROUP = ("world_size", "seq_len", "global_batch")
_IDENTITY = (*FACTORS, "cp", "ep", "vpp", "dp", *_GROUP)


@dataclass(frozen=True)
class Effect:
    """What changing one choice does, all others and the ranks alike (DP takes up the rest).

    Attributes:
        factor: the choice.
        before, after: its two values.
        ratios: step time after over before, of each pair of runs that differ in nothing else.
    """

    factor: str
    before: str
    after: str
    ratios: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median ratio: below 1 is faster."""
        return statistics.median(self.ratios)


def effects(rows: Rows) -> list[Effect]:
    """Matched pairs: runs that are ok and differ in one factor.

    DP follows from the others and so may differ, and so may the number of micro-batches.
    """
    done = [row for row in rows if row["status"] == "ok"]
    found = []
    for factor in FACTORS:
        values = sorted({row[factor] for row in done if row[factor] is not None}, key=_order)
        others = [name for name in _IDENTITY if name not in (factor, "dp", "schedule")]
        if factor not in ("sp", "schedule"):  # a schedule comes with SP
            others.append("schedule")
        for before, after in _changes(values):
            known = {
                tuple(row[name] for name in others): row for row in done if row[factor] == before
            }
            ratios = tuple(
                row["step_time_s"] / known[same]["step_time_s"]
                for row in done
                if row[factor] == after and (same := tuple(row[name] for name in others)) in known
            )
            if ratios:
                found.append(Effect(factor, str(before), str(after), ratios))
    return found


def _changes(values: Sequence[Any]) -> list[tuple[Any, Any]]:
    """Which values of a choice are compared: neighbouring numbers; names with the plain one."""
    if not values or not isinstance(values[0], str):
        return list(itertools.pairwise(values))
    base = next((name for name in _PLAIN if name in values), values[0])
    return [(base, value) for value in values if value != base]


def _order(value: Any) -> tuple[int, Any]:
    return (0, value) if isinstance(value, (int, float)) else (1, str(value))


def groups(
    rows: Rows,
) -> dict[tuple[int, int, int], list[Mapping[str, Any]]]:
    """Rows by ranks, sequence length and global batch: only such are alternatives."""
    found: dict[tuple[int, int, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in _GROUP), []).append(row)
    return dict(sorted(found.items()))


def ranked(rows: Rows) -> list[Mapping[str, Any]]:
    """The rows that ran, fastest first."""
    return sorted(
        (row for row in rows if row["status"] == "ok"), key=lambda row: row["step_time_s"]
    )


def best_tables(rows: Rows, top: int) -> list[Table]:
    """The fastest layouts of each group; what failed is counted in the title."""
    tables = []
    for (ranks, length, batch), members in groups(rows).items():
        counts = Counter(row["status"] for row in members)
        told = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
        table = Table(
            title=f"{ranks} ranks, {length:,} tokens a sequence, {batch} sequences a step ({told})"
        )
        table.add_column("layout")
        for name in ("s/step\n(spread)", "over\nbest", "tokens/s", "MFU\n(causal)",
                     "memory since\nstart, MiB", "sent a rank\nand step, MiB"):  # fmt: skip
            table.add_column(name, justify="right")
        fastest = ranked(members)
        for row in fastest[:top]:
            share = row["mfu"]
            table.add_row(
                row["layout"],
                f"{row['step_time_s']:.3f} ({row['step_time_spread']:.0%})",
                f"{row['step_time_s'] / fastest[0]['step_time_s']:.2f}",
                f"{row['tokens_per_s']:,.0f}",
                "-" if share is None else f"{share:.1%} ({row['causal_mfu']:.1%})",
                f"{row['memory_since_start_bytes'] / MIB:,.0f}",
                f"{row['bytes_sent_per_step'] / MIB:,.1f}",
            )
        tables.append(table)
    return tables


def effect_table(rows: Rows) -> Table:
    """One row a change of one choice."""
    table = Table(
        title="What one choice changes, all others alike",
        caption="step time after / before, over pairs of runs that differ in nothing else but DP",
    )
    for name in ("choice", "from", "to"):
        table.add_column(name)
    for name in ("median", "least", "most", "pairs"):
        table.add_column(name, justify="right")
    for effect in effects(rows):
        table.add_row(
            _title(effect.factor),
            effect.before,
            effect.after,
            f"{effect.median:.3f}",
            f"{min(effect.ratios):.3f}",
            f"{max(effect.ratios):.3f}",
            str(len(effect.ratios)),
        )
    return table


def failure_table(rows: Rows) -> Table | None:
    """What did not run, and why; None when all did."""
    failed = [row for row in rows if row["status"] != "ok"]
    if not failed:
        return None
    table = Table(title="What did not run")
    for name in ("layout", "status", "why"):
        table.add_column(name)
    for row in failed:
        name = f"{row['layout']}, {row['seq_len']:,} tokens"
        table.add_row(name, row["flags"] or row["status"], row["reason"][:100])
    return table


def _title(factor: str) -> str:
    return {"seq_parallel": "TP-SP", "tp": "TP", "pp": "PP", "sp": "SP", "zero": "ZeRO"}.get(
        factor, factor.replace("_", " ")
    )
