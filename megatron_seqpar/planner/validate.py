# SPDX-License-Identifier: Apache-2.0
"""Predictions of measured runs, and how good they are.

    OOM precision   of the runs predicted not to fit, the share that ran out of memory
    OOM recall      of the runs that ran out of memory, the share predicted not to fit
    MAPE            mean of |predicted / measured - 1| of step times, runs that finished
    Kendall tau     (tau-b) of predicted and measured step times, within a group
    regret          measured time of the pick over that of the group's fastest run, minus 1; the
                    pick is the first, in the planner's order, of those predicted to fit that did
                    finish; "of 3" is the best of the first three such
    top-1 OOM       the first of those predicted to fit ran out of memory

A group is what competes: model, sequence length, global batch and ranks of one file.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import SeqParError
from ..mfu import model_flops, utilization
from .estimate import peak_memory, step_time
from .hardware import Cluster
from .ranking import BAND, ranked
from .runs import Run

COLUMNS = ("pred_memory_bytes", "pred_fits", "pred_step_time_s", "pred_mfu")


@dataclass(frozen=True)
class Predicted:
    """A run with what the planner says of it; `memory` and `time` are None for a layout that it
    refuses."""

    run: Run
    memory: float | None
    fits: bool
    time: float | None
    mfu: float | None

    def cells(self) -> tuple[str, ...]:
        """Text of the four columns; empty where there is no prediction."""
        if self.memory is None or self.time is None or self.mfu is None:
            return ("", "False", "", "")
        return (f"{self.memory:.0f}", str(self.fits), f"{self.time:.6g}", f"{self.mfu:.6g}")


def predict_runs(runs: Iterable[Run], cluster: Cluster) -> list[Predicted]:
    """Predict every run, also those that failed."""
    return [_predict(run, cluster) for run in runs]


def _predict(run: Run, cluster: Cluster) -> Predicted:
    if run.problem is not None:
        return Predicted(run, None, False, None, None)
    layout = run.layout
    memory = peak_memory(run.model, cluster, layout)
    time = step_time(run.model, cluster, layout).total
    flops = model_flops(run.model, layout.sequence_length, layout.global_batch)
    mfu = utilization(flops, time, layout.ranks, cluster.peak)
    return Predicted(run, memory, memory <= cluster.capacity.value, time, mfu)


@dataclass(frozen=True)
class Scores:
    """How good predictions of some runs are; None where nothing can be said."""

    name: str
    finished: int
    out_of_memory: int
    others: int
    oom_precision: float | None
    oom_recall: float | None
    mape: float | None
    tau: float | None
    regret: float | None
    regret_of_3: float | None
    top1_oom: bool | None


def score(predicted: Sequence[Predicted], name: str, band: float = BAND) -> Scores:
    """Scores of the runs of one group, or of several if ranking them together makes sense.

    band: of `ranked`, by which picks are made.
    """
    known = [each for each in predicted if each.run.decided]
    done = [each for each in known if each.run.ok and each.time is not None]
    oom = [each for each in known if each.run.status == "oom"]
    flagged = [each for each in known if not each.fits]
    right = sum(not each.fits for each in oom)
    pairs = [(each.time or 0.0, each.run.step_time) for each in done]
    order = ranked(
        (each for each in known if each.fits and each.time is not None),
        lambda each: each.time or math.inf,
        lambda each: each.run.layout,
        band,
    )
    picks = [each for each in order if each.run.ok][:3]
    best = min((actual for _, actual in pairs), default=None)
    regret = regret3 = None
    if picks and best is not None:
        regret = picks[0].run.step_time / best - 1
        regret3 = min(each.run.step_time for each in picks) / best - 1
    return Scores(
        name=name,
        finished=len(done),
        out_of_memory=len(oom),
        others=len(predicted) - len(known),
        oom_precision=right / len(flagged) if flagged else None,
        oom_recall=right / len(oom) if oom else None,
        mape=sum(abs(p / m - 1) for p, m in pairs) / len(pairs) if pairs else None,
        tau=kendall_tau(pairs),
        regret=regret,
        regret_of_3=regret3,
        top1_oom=order[0].run.status == "oom" if order else None,
    )


def score_groups(predicted: Sequence[Predicted], band: float = BAND) -> list[Scores]:
    """Scores of each group, in the order of the rows; `band` as in `score`."""
    groups: dict[tuple[str, ...], list[Predicted]] = {}
    for each in predicted:
        groups.setdefault(each.run.group, []).append(each)
    return [
        score(members, " ".join(part for part in group if part), band)
        for group, members in groups.items()
    ]


def kendall_tau(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Tau-b of two orders; None below two pairs or where all are tied."""
    agree = left = right = 0
    for i, (a, b) in enumerate(pairs):
        for c, d in pairs[:i]:
            one, two = (a > c) - (a < c), (b > d) - (b < d)
            agree += one * two
            left += one * one
            right += two * two
    return agree / math.sqrt(left * right) if left and right else None


def write_predictions(predicted: Sequence[Predicted], path: Path) -> None:
    """The rows as they were read with the four columns; SeqParError where that fails."""
    names = list(dict.fromkeys(name for each in predicted for name in each.run.row))
    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([*names, *COLUMNS])
            for each in predicted:
                writer.writerow([*(each.run.row.get(n, "") for n in names), *each.cells()])
    except OSError as error:
        raise SeqParError(f"--predictions {path}: cannot be written: {error}") from None
