# SPDX-License-Identifier: Apache-2.0
"""`plan calibrate`, `plan validate` and the pictures, as a user runs them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_seqpar.commands.plan import plan
from megatron_seqpar.errors import SeqParError
from megatron_seqpar.planner.layout import Layout
from megatron_seqpar.planner.ranking import ranked

from .models import MODELS
from .test_fit import made_up, truth


@pytest.fixture
def sheet(tmp_path: Path) -> Path:
    """Runs of a made-up cluster."""
    path = tmp_path / "sheet.csv"
    rows = [dict(run.row) for run in made_up(truth())]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_calibrate_and_then_validate(sheet: Path, tmp_path: Path) -> None:
    made, predictions = tmp_path / "mine.yaml", tmp_path / "predictions.csv"
    done = CliRunner().invoke(plan, ["calibrate", str(sheet), "-o", str(made)])
    assert done.exit_code == 0, done.output
    assert "calibrated" in done.output
    command = ["validate", str(sheet), "--cluster", str(made), "--predictions", str(predictions)]
    done = CliRunner().invoke(plan, [*command, "--json"])
    assert done.exit_code == 0, done.output
    scores = json.loads(done.output)["all"]
    assert scores["mape"] < 0.02
    assert scores["oom_precision"] > 0.9
    assert scores["tau"] > 0.95
    assert len(predictions.read_text().splitlines()) == len(sheet.read_text().splitlines())


def test_runs_of_another_device_are_refused(sheet: Path, tmp_path: Path) -> None:
    """Else a sweep on a laptop would be judged, or calibrate, as one on the cluster's GPUs."""
    with sheet.open(newline="") as file:
        rows = list(csv.DictReader(file))
    other = tmp_path / "other.csv"
    for device, refused in (("NVIDIA A100-SXM4-80GB", False), ("CPU x86_64, 2 cores", True)):
        with other.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0], "device"])
            writer.writeheader()
            writer.writerows({**row, "device": device} for row in rows[:3])
        for command in (["validate"], ["calibrate", "-o", str(tmp_path / "made.yaml")]):
            done = CliRunner().invoke(plan, [command[0], str(other), *command[1:]])
            assert (done.exit_code != 0) == refused, done.output
            if refused:
                assert isinstance(done.exception, SeqParError)
                assert "device CPU x86_64, 2 cores: --cluster dgx-a100" in str(done.exception)


def test_the_table_of_scores(sheet: Path) -> None:
    done = CliRunner().invoke(plan, ["validate", str(sheet)])
    assert done.exit_code == 0, done.output
    for text in ("MAPE", "Kendall tau", "OOM recall", "regret"):
        assert text in done.output


@pytest.mark.parametrize("arguments", [(), ("--plot", "plan.png")])
def test_pictures(arguments: tuple[str, ...], tmp_path: Path) -> None:
    drawn = [str(tmp_path / part) if part.endswith(".png") else part for part in arguments]
    done = CliRunner().invoke(
        plan, ["--model", str(MODELS / "llama2-7b.yaml"), "--seq-length", "4096", *drawn]
    )
    assert done.exit_code == 0, done.output
    for path in drawn[1:]:
        assert Path(path).read_bytes().startswith(b"\x89PNG")


def test_the_scaling_picture(tmp_path: Path) -> None:
    path = tmp_path / "scaling.png"
    done = CliRunner().invoke(plan, ["reproduce", "lightseq", "--json", "--plot", str(path)])
    assert done.exit_code == 0, done.output
    assert path.read_bytes().startswith(b"\x89PNG")


def test_an_unknown_study_is_refused() -> None:
    done = CliRunner().invoke(plan, ["reproduce", "megatron"])
    assert isinstance(done.exception, SeqParError)
    assert "use lightseq" in str(done.exception)


def test_a_file_that_is_no_csv_is_named(tmp_path: Path) -> None:
    path = tmp_path / "empty.csv"
    path.write_text("")
    done = CliRunner().invoke(plan, ["validate", str(path)])
    assert isinstance(done.exception, SeqParError)
    assert "holds no rows" in str(done.exception)


def test_layouts_that_cannot_be_told_apart_are_ordered_by_thrift() -> None:
    """10.0 and 10.3 s are equal, 10.9 s is not."""
    timed = [
        (10.0, Layout(2048, 64, tp=2, pp=2)),
        (10.3, Layout(2048, 64, pp=2, micro_batch=2)),
        (10.4, Layout(2048, 64, pp=2)),
        (10.9, Layout(2048, 64)),
        (10.2, Layout(2048, 64, tp=2)),
        (10.1, Layout(2048, 64, tp=2, sp=4)),
    ]
    order = ranked(timed, lambda item: item[0], lambda item: item[1])
    assert [seconds for seconds, _ in order] == [10.4, 10.2, 10.3, 10.1, 10.0, 10.9]
    by_time = ranked(timed, lambda item: item[0], lambda item: item[1], band=1e-9)
    assert [item[0] for item in by_time] == sorted(item[0] for item in timed)
    assert ranked([], lambda item: item[0], lambda item: item[1]) == []
