# SPDX-License-Identifier: Apache-2.0
"""What docs/planner.md says is what the code does, and its numbers are those of the result file."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_seqpar.planner.constants import Constants

REPOSITORY = Path(__file__).resolve().parents[2]
TEXT = (REPOSITORY / "docs" / "planner.md").read_text(encoding="utf-8")
RESULT = json.loads((REPOSITORY / "benchmarks" / "results" / "planner.json").read_text())[
    "left_out"
]


def test_the_example_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "StepTime" in done.stdout


def test_the_table_is_the_result() -> None:
    rows = re.findall(r"^\| (13B|30B|all).*? \| (\d+) / (\d+) \| (.*) \|$", TEXT, re.MULTILINE)
    groups = [*RESULT["groups"], RESULT["all"]]
    assert len(rows) == len(groups) == 6
    for (_, finished, failed, cells), known in zip(rows, groups, strict=True):
        assert (int(finished), int(failed)) == (known["finished"], known["out_of_memory"])
        precision, recall, mape, tau, regret, rule = cells.split(" | ")
        assert float(precision) == pytest.approx(known["oom_precision"], abs=6e-4)
        assert float(recall) == pytest.approx(known["oom_recall"], abs=6e-4)
        assert float(mape.rstrip("%")) == pytest.approx(100 * known["mape"], abs=0.06)
        assert float(tau) == pytest.approx(known["tau"], abs=6e-3)
        assert float(regret.rstrip("%")) == pytest.approx(100 * known["regret"], abs=0.06)
        theirs = known.get("rule_of_thumb_regret", RESULT["rule_of_thumb_regret"]["mean"])
        assert float(rule.rstrip("%")) == pytest.approx(100 * theirs, abs=0.06)


def test_the_result_holds_no_rows() -> None:
    assert all("step_time" not in json.dumps(group) for group in RESULT["groups"])
    assert not any(known["top1_oom"] for known in RESULT["groups"])


def test_the_number_of_constants() -> None:
    assert len(Constants.names()) == 29
    assert "Twenty-nine constants are free" in TEXT
