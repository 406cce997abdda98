# SPDX-License-Identifier: Apache-2.0
"""The table of other planners in docs/planner.md has the numbers of its result file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "benchmarks" / "results"
TEXT = (REPOSITORY / "docs" / "planner.md").read_text(encoding="utf-8")
MEASURED = json.loads((RESULTS / "planner_baselines.json").read_text(encoding="utf-8"))
ROWS = {
    "the planner, each sheet left out": ("planner", "left_out"),
    "Calculon": ("Calculon", "as_it_comes"),
    "Calculon, fitted": ("Calculon", "with_factors"),
    "llm-analysis": ("llm-analysis", "as_it_comes"),
    "llm-analysis, fitted": ("llm-analysis", "with_factors"),
}


@pytest.mark.parametrize("name", ROWS)
def test_the_table_is_the_result(name: str) -> None:
    tool, part = ROWS[name]
    known: dict[str, Any] = MEASURED[tool][part]["all"]
    [line] = re.findall(rf"^\| {name} \| (.*) \|$", TEXT, re.MULTILINE)
    precision, recall, mape, tau, own, thrift, failed = line.split(" | ")
    assert float(precision) == pytest.approx(known["oom_precision"], abs=6e-4)
    assert float(recall) == pytest.approx(known["oom_recall"], abs=6e-4)
    assert float(mape.rstrip("%")) == pytest.approx(100 * known["mape"], abs=0.06)
    assert float(tau) == pytest.approx(known["tau"], abs=6e-3)
    for text, regret in ((own, known["regret"]), (thrift, known["thrift_regret"])):
        mean, worst = re.fullmatch(r"([\d.]+)% \(([\d.]+)%\)", text).groups()  # type: ignore[union-attr]
        assert float(mean) == pytest.approx(100 * regret["mean"], abs=0.06)
        assert float(worst) == pytest.approx(100 * regret["worst"], abs=0.06)
    assert failed == f"{known['top1_oom']} of 5"


def test_the_planner_is_ahead_where_the_page_says_so() -> None:
    ours = MEASURED["planner"]["left_out"]["all"]
    for tool in ("Calculon", "llm-analysis"):
        assert MEASURED[tool]["refused"] == 0
        for part in ("as_it_comes", "with_factors"):
            theirs = MEASURED[tool][part]["all"]
            assert ours["oom_recall"] > theirs["oom_recall"]
            assert ours["mape"] < theirs["mape"] / 2
            assert ours["tau"] > theirs["tau"]


def test_the_planner_is_the_one_of_its_own_result() -> None:
    """Whoever changes the model runs both."""
    own = json.loads((RESULTS / "planner.json").read_text(encoding="utf-8"))["left_out"]["all"]
    here = MEASURED["planner"]["left_out"]["all"]
    assert here["mape"] == pytest.approx(own["mape"], abs=2e-3)
    assert here["oom_recall"] == pytest.approx(own["oom_recall"], abs=3e-3)
    assert here["tau"] == pytest.approx(own["tau"], abs=0.01)


def test_the_results_hold_no_rows() -> None:
    assert "step_time" not in json.dumps(MEASURED)
