# SPDX-License-Identifier: Apache-2.0
"""A cell of a training benchmark: ways trained in turn on the same data, and their rows."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..experiments.numbers import largest_difference
from ..experiments.peaks import peak_of_rows
from ..experiments.training import Training
from ..mfu import Peak
from .ranks import Row, say
from .rounds import interleave, median_ratio
from .training import Trainer, Way, described, left_out

Measured = Mapping[str, Sequence[Row]]
Save = Callable[[list[Row]], None]

MEDIANS = (
    "seconds",
    "tokens_per_second",
    "peak_memory_bytes",
    "memory_since_start_bytes",
    "bytes_sent_per_step",
)


@dataclass(frozen=True)
class Cell:
    """One training (a length), and the ways to do it.

    Attributes:
        trainer, training: what runs.
        ways: by name, in the order of rows.
        rounds: how often each is run.
        limit_gib: memory above which unfused attention is not tried (`training.left_out`).
        bases: ways that the others' step times are divided by.
        reference: the way whose losses another's are compared with, or None.
        facts: what a row says of its way before its numbers.
        more: what a finished row gets besides, from the way, the row and the peak of all rows.
    """

    trainer: Trainer
    training: Training
    ways: Mapping[str, Way]
    rounds: int
    limit_gib: float
    bases: Sequence[str]
    reference: Callable[[str, Measured], str | None]
    facts: Callable[[Way], Row]
    more: Callable[[Way, Row, Peak | None], Row]

    def run(self, save: Save) -> list[Row]:
        """Rows of all ways; `save` gets what there is after every run."""
        batch = self.training.batch
        reasons = {
            name: why
            for name, way in self.ways.items()
            if (why := left_out(way, self.trainer.machine, self.training, batch, self.limit_gib))
        }
        measured = measure(
            [name for name in self.ways if name not in reasons],
            self.rounds,
            self._attempt,
            lambda found: save(self._rows(found, reasons)),
        )
        return self._rows(measured, reasons)

    def _attempt(self, name: str, number: int) -> Row:
        way = self.ways[name]
        row = described(way, self.trainer.run(way, self.training, lambda line: None))
        told = f"{row['seconds']:.3g} s a step" if row["status"] == "ok" else row["status"]
        ranks = way.layout.ranks
        where = f"{ranks} rank{'s' * (ranks > 1)}, {self.training.sequence_length:,} tokens"
        say(f"{where}, round {number + 1}/{self.rounds}, {name}: {told}")
        return row

    def _rows(self, measured: Measured, reasons: Mapping[str, str]) -> list[Row]:
        found = summarized(measured, self.bases, lambda name: self.reference(name, measured))
        peak = peak_of_rows(found.values())
        rows = []
        for name, way in self.ways.items():
            key = {"way": name, "tokens": self.training.sequence_length, **self.facts(way)}
            if name in reasons:
                rows.append({**key, "status": "left out", "why": reasons[name]})
            elif name in found:
                good = found[name]["status"] == "ok"
                more = self.more(way, found[name], peak) if good else {}
                rows.append({**key, **found[name], **more})
        return rows


def continued(save: Save, rows: Sequence[Row]) -> Save:
    """Saves what comes after `rows` together with them."""
    before = list(rows)
    return lambda found: save([*before, *found])


def ran(name: str, measured: Measured) -> bool:
    """Whether a way ran in every round that there was."""
    rows = measured.get(name, ())
    return bool(rows) and all(row["status"] == "ok" for row in rows)


def measure(
    names: Sequence[str],
    rounds: int,
    attempt: Callable[[str, int], Row],
    seen: Callable[[Mapping[str, list[Row]]], None],
) -> dict[str, list[Row]]:
    """`attempt(way, round)` for each way in turn: `described` rows by way, one a round.

    A way that failed is not tried again. `seen` gets what there is after every run.
    """
    found: dict[str, list[Row]] = {name: [] for name in names}

    def once(name: str, number: int) -> Row:
        failed = [row for row in found[name] if row["status"] != "ok"]
        row = failed[0] if failed else attempt(name, number)
        found[name].append(row)
        seen(found)
        return row

    interleave(names, rounds, once)
    return found


def summarized(
    measured: Mapping[str, Sequence[Row]],
    bases: Sequence[str],
    reference: Callable[[str], str | None],
) -> dict[str, Row]:
    """One row a way: medians over its rounds, and ratios within them.

    `time_over` holds the step time over that of each of `bases`, where both ran in a round.
    `largest_loss_difference` is against the way that `reference` names for it, over all rounds;
    `losses_compared_with` names that.
    A way that failed in a round has that failure and no numbers. Ways without a round are left out.
    """
    rounds = max((len(rows) for rows in measured.values()), default=0)
    times = [
        {name: rows[i]["seconds"] for name, rows in measured.items() if _ran(rows, i)}
        for i in range(rounds)
    ]
    found: dict[str, Row] = {}
    for name, rows in measured.items():
        failed = [row for row in rows if row["status"] != "ok"]
        if failed or not rows:
            found |= {name: {**failed[0]}} if failed else {}
            continue
        row = {**rows[0], **{key: statistics.median(r[key] for r in rows) for key in MEDIANS}}
        row["seconds_by_round"] = [each["seconds"] for each in rows]
        row["time_over"] = {base: median_ratio(times, name, base) for base in bases}
        other = reference(name)
        row["largest_loss_difference"] = _loss_difference(rows, measured.get(other or ""))
        row["losses_compared_with"] = other
        found[name] = row
    return found


def _ran(rows: Sequence[Row], index: int) -> bool:
    return index < len(rows) and rows[index]["status"] == "ok"


def _loss_difference(rows: Sequence[Row], others: Sequence[Row] | None) -> Any:
    """Over the rounds that both have; None where there is none or a loss is unknown."""
    pairs = [(a, b) for a, b in zip(rows, others or (), strict=False) if b["status"] == "ok"]
    found = [largest_difference(a["losses"], b["losses"]) for a, b in pairs]
    known = [difference for difference in found if difference is not None]
    return max(known) if known and len(known) == len(found) else None
