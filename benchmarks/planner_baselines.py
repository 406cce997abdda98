# SPDX-License-Identifier: Apache-2.0
"""How well other planners predict the runs that ours is validated on: Calculon and llm-analysis.

    git clone https://github.com/calculon-ai/calculon
    git clone https://github.com/cli99/llm-analysis
    python -m pip install --target deps pandas psutil fire     # what the two import
    PYTHONPATH=deps python -m benchmarks.planner_baselines FOLDER \\
        --calculon calculon --llm-analysis llm-analysis \\
        --output benchmarks/results/planner_baselines.json

FOLDER is that of `benchmarks.planner_validation`, and so are the rows and the scores. Each tool is
scored twice: as it comes, and after two numbers were fitted to the *other* sheets, as our constants
are: one factor for all its times, the median of measured over predicted, and one for all its bytes,
that which misjudges the fewest runs. `baseline_tools` says how a row is put to each.

A tool's pick is the least of its predicted times among the runs that it predicts to fit. `thrift`
is the regret with our planner's own order in its place (`planner/ranking.py`), for the tool and for
the planner alike. The result has scores and no rows.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, median
from typing import Any

from megatron_seqpar.commands.plan_report import overall, print_scores
from megatron_seqpar.planner.runs import Run, read_runs
from megatron_seqpar.planner.validate import Predicted, score_groups

from .baseline_tools import Answer, Calculon, LlmAnalysis, Tool
from .planner_validation import leave_one_out

Sheets = dict[str, list[Run]]
Asked = list[tuple[Run, Answer | None]]


def ask(tool: Tool, runs: Sequence[Run]) -> tuple[Asked, list[str]]:
    """A tool's answers, None for rows that it refuses, and its reasons."""
    found: Asked = []
    reasons: list[str] = []
    for run in runs:
        answer = None
        if run.problem is None:
            try:
                answer = tool.ask(run.model, run.layout)
            except Exception as error:  # whatever a foreign tool raises is its refusal
                reasons.append(f"{type(error).__name__}: {error}")
        found.append((run, answer))
    return found, reasons


def time_factor(asked: Asked) -> float:
    """Median of measured over predicted step times."""
    return median(run.step_time / answer.time for run, answer in asked if run.ok and answer)


def memory_factor(asked: Asked, capacity: float) -> float:
    """The factor on predicted bytes that misjudges the fewest runs; of several, the middle one."""
    known = [(run, answer) for run, answer in asked if run.decided and answer]
    limits = sorted({capacity / answer.memory for _, answer in known})
    candidates = [limits[0] / 2, *map(_between, limits, limits[1:]), limits[-1] * 2]

    def wrong(factor: float) -> int:
        return sum(
            (answer.memory * factor > capacity) != (run.status == "oom") for run, answer in known
        )

    least = min(map(wrong, candidates))
    best = [factor for factor in candidates if wrong(factor) == least]
    return best[len(best) // 2]


def _between(low: float, high: float) -> float:
    return math.sqrt(low * high)


def predictions(
    asked: Asked, capacity: float, time: float = 1.0, memory: float = 1.0
) -> list[Predicted]:
    """Answers as predictions, times the factors. MFU is not asked for: a count of FLOPs that the
    tools do not share would decide it."""
    found = []
    for run, answer in asked:
        if answer is None:
            found.append(Predicted(run, None, False, None, None))
            continue
        held = answer.memory * memory
        found.append(Predicted(run, held, held <= capacity, answer.time * time, None))
    return found


def own_regret(predicted: Sequence[Predicted]) -> tuple[float | None, bool | None]:
    """Regret of the least predicted time that fits and did run, and whether the least of all that
    fit ran out of memory; of one group."""
    fit = [each for each in predicted if each.run.decided and each.fits and each.time is not None]
    order = sorted(fit, key=lambda each: each.time or math.inf)
    best = min((each.run.step_time for each in predicted if each.run.ok), default=None)
    pick = next((each.run.step_time for each in order if each.run.ok), None)
    regret = None if pick is None or best is None else pick / best - 1
    return regret, order[0].run.status == "oom" if order else None


def report(predicted: list[Predicted]) -> dict[str, Any]:
    """Scores by group and over all, with the regret of either order."""
    groups: dict[tuple[str, ...], list[Predicted]] = {}
    for each in predicted:
        groups.setdefault(each.run.group, []).append(each)
    scored = score_groups(predicted)
    rows = []
    for scores, members in zip(scored, groups.values(), strict=True):
        row = asdict(scores)
        row["thrift_regret"], row["thrift_top1_oom"] = row.pop("regret"), row.pop("top1_oom")
        row["regret"], row["top1_oom"] = own_regret(members)
        del row["regret_of_3"]
        rows.append(row)
    total = asdict(overall(predicted, scored))
    kept = ("finished", "out_of_memory", "oom_precision", "oom_recall", "mape", "tau")
    every: dict[str, Any] = {name: total[name] for name in kept}
    for name in ("regret", "thrift_regret"):
        known = [row[name] for row in rows if row[name] is not None]
        every[name] = {"mean": fmean(known), "worst": max(known)} if known else None
    every["top1_oom"] = sum(row["top1_oom"] is True for row in rows)
    return {"groups": rows, "all": every}


def evaluate(tool: Tool, sheets: Sheets) -> dict[str, Any]:
    """Scores of a tool as it comes and with factors from the other sheets."""
    answers = {name: ask(tool, runs) for name, runs in sheets.items()}
    plain: list[Predicted] = []
    fitted: list[Predicted] = []
    factors = {}
    for name, (asked, _) in answers.items():
        others = [pair for other, (rows, _) in answers.items() if other != name for pair in rows]
        time, memory = time_factor(others), memory_factor(others, tool.capacity)
        factors[name] = {"time": time, "memory": memory}
        plain += predictions(asked, tool.capacity)
        fitted += predictions(asked, tool.capacity, time, memory)
    for title, each in (("as it comes", plain), ("factors from the other sheets", fitted)):
        print(f"{tool.name}, {title}")
        print_scores(each)
    refused = [reason for _, reasons in answers.values() for reason in reasons]
    return {
        "version": tool.version,
        "commit": tool.commit,
        "refused": len(refused),
        "reasons": sorted(set(refused)),
        "as_it_comes": report(plain),
        "factors": factors,
        "with_factors": report(fitted),
    }


def main() -> None:
    """Parse the arguments, evaluate, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--calculon", type=Path, help="a checkout of Calculon")
    parser.add_argument("--llm-analysis", type=Path, help="a checkout of llm-analysis")
    parser.add_argument("--cluster", default="dgx-a100", help="of the planner's own predictions")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    sheets = {path.stem: read_runs([path]) for path in sorted(arguments.folder.glob("*.csv"))}
    tools: list[Tool] = []
    if arguments.calculon is not None:
        tools.append(Calculon(arguments.calculon))
    if arguments.llm_analysis is not None:
        tools.append(LlmAnalysis(arguments.llm_analysis))
    result: dict[str, Any] = {tool.name: evaluate(tool, sheets) for tool in tools}
    result["planner"] = {"left_out": report(leave_one_out(sheets, arguments.cluster))}
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
