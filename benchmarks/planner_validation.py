# SPDX-License-Identifier: Apache-2.0
"""How well the planner predicts runs that it was not calibrated on: each sheet is left out once.

    python -m benchmarks.planner_validation FOLDER --output benchmarks/results/planner.json

FOLDER holds CSV files as `megatron-seqpar plan calibrate` reads them, one a sheet. The result has
scores of each sheet and of all, of the planner and of the Layouts study's rule of thumb, and no
rows. `tau_ceiling` is Kendall's tau of the measured times and the same times with the noise of a
repetition on them: what a perfect model would reach. `regret_by_band` has each sheet's regret with
other widths of the band in which times count as equal (`megatron_seqpar/planner/ranking.py`); 0% is
by time alone. `--all` also reports the fit on all sheets at
once, and the left-out predictions without the runs that docs/planner.md cannot explain.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_seqpar.commands.plan_report import overall, print_scores
from megatron_seqpar.planner.constants_file import read_planner_cluster
from megatron_seqpar.planner.fit import calibrate
from megatron_seqpar.planner.runs import Run, read_runs
from megatron_seqpar.planner.validate import Predicted, kendall_tau, predict_runs, score_groups

_REPETITION = 0.007  # of log step time: repeated runs of the sheets differ by 0.3 to 1.1%
_DRAWS = 50
_BANDS = (1e-9, 0.05, 0.07, 0.08, 0.10, 0.15)  # widths for the order of picks; the first is none


def leave_one_out(sheets: dict[str, list[Run]], cluster_name: str) -> list[Predicted]:
    """Predictions of every sheet by constants that were fitted to the others."""
    predicted: list[Predicted] = []
    for name, runs in sheets.items():
        others = [run for other, rows in sheets.items() if other != name for run in rows]
        fitted = calibrate(read_planner_cluster(cluster_name), others, "the other sheets")
        predicted += predict_runs(runs, fitted.cluster)
    return predicted


def rule_of_thumb(runs: Sequence[Run]) -> float | None:
    """Regret of the study's rule: micro-batch 1, no recomputation, the smallest TP x PP that runs,
    PP before TP, the best kernels."""
    finished = [run for run in runs if run.ok]
    if not finished:
        return None
    ordered = sorted(
        finished,
        key=lambda run: (
            run.layout.kernel != "flash2",
            not run.layout.fused_norm,
            run.layout.micro_batch,
            run.layout.recompute != "none",
            run.layout.tp * run.layout.pp,
            run.layout.tp,
            not run.layout.tp_sp,
        ),
    )
    return ordered[0].step_time / min(run.step_time for run in finished) - 1


def tau_ceiling(runs: Sequence[Run]) -> float | None:
    """Mean tau of the finished runs' times and disturbed copies of them."""
    times = [run.step_time for run in runs if run.ok]
    draw = random.Random(0)
    taus = [
        kendall_tau([(time * math.exp(draw.gauss(0, _REPETITION)), time) for time in times])
        for _ in range(_DRAWS)
    ]
    known = [tau for tau in taus if tau is not None]
    return fmean(known) if known else None


def unexplained(run: Run) -> bool:
    """Pipelines with FlashAttention-2 of the 13B model at 2K tokens: each step took some six
    micro-batches longer than its fill and drain, with no other kernel, model or length."""
    small = run.model.hidden == 5120 and run.layout.sequence_length == 2048
    return small and run.layout.kernel == "flash2" and run.layout.pp > 1


def report(predicted: list[Predicted]) -> dict[str, Any]:
    """Scores by group and over all, and the rule of thumb's regret beside them."""
    groups = score_groups(predicted)
    members: dict[tuple[str, ...], list[Run]] = {}
    for each in predicted:
        members.setdefault(each.run.group, []).append(each.run)
    rules = [rule_of_thumb(runs) for runs in members.values()]
    known = [rule for rule in rules if rule is not None]
    regrets = [each.regret for each in groups if each.regret is not None]
    by_band = {band: [one.regret for one in score_groups(predicted, band)] for band in _BANDS}
    return {
        "groups": [
            {**asdict(each), "rule_of_thumb_regret": rule, "tau_ceiling": tau_ceiling(runs)}
            for each, rule, runs in zip(groups, rules, members.values(), strict=True)
        ],
        "all": asdict(overall(predicted, groups)),
        "worst_regret": max(regrets),
        "regret_by_band": {f"{band:.0%}": found for band, found in by_band.items()},
        "rule_of_thumb_regret": {"mean": fmean(known), "worst": max(known)},
    }


def main() -> None:
    """Parse the arguments, evaluate, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cluster", default="dgx-a100")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--all", action="store_true", help="also fit and score all sheets at once")
    arguments = parser.parse_args()
    sheets = {path.stem: read_runs([path]) for path in sorted(arguments.folder.glob("*.csv"))}
    predicted = leave_one_out(sheets, arguments.cluster)
    print_scores(predicted)
    result = {"left_out": report(predicted)}
    if arguments.all:
        explained = [each for each in predicted if not unexplained(each.run)]
        print_scores(explained)
        result["left_out_explained"] = report(explained)
        runs = [run for rows in sheets.values() for run in rows]
        fitted = calibrate(read_planner_cluster(arguments.cluster), runs, "all sheets")
        inside = predict_runs(runs, fitted.cluster)
        print_scores(inside)
        result["all_sheets"] = report(inside)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
