# SPDX-License-Identifier: Apache-2.0
"""Spaces, the CSV, effects of single choices, and jobs of SLURM."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_seqpar.errors import SeqParError
from megatron_seqpar.experiments.execute import Outcome
from megatron_seqpar.experiments.layout import Layout
from megatron_seqpar.mfu import Peak, model_flops, model_from_flags
from megatron_seqpar.sweep import plot, report, slurm
from megatron_seqpar.sweep.columns import COLUMNS, csv_row, write_csv
from megatron_seqpar.sweep.space import Point, Slurm, Space
from tests.experiments.scripts import REPORT, job

SIZES = {"num-layers": 4, "hidden-size": 64, "num-attention-heads": 8, "vocab-size": 256}
MODEL = model_from_flags(SIZES)
STUDY = {"model", "hidden", "layers", "heads", "ffn", "seq_len", "global_batch", "world_size"}
STUDY |= {"tp", "pp", "dp", "micro_batch", "num_microbatches", "act_ckpt", "kernel", "mfu"}
STUDY |= {"attention_kernel", "seq_parallel", "status", "step_time_s", "sp", "recompute", "zero"}


def space(**changes) -> Space:
    return Space.model_validate({"model": "m.yaml", "global_batch_size": 4, **changes})


def test_a_grid_leaves_out_what_cannot_be_and_counts_it():
    grid = {"ranks": 4, "seq-length": 64, "tp": [1, 2, 3], "sp": [1, 2, 4], "micro-batch": [1, 8]}
    points, left_out = space(grid=grid).points("cpu", MODEL)
    found = {(p.layout.tp, p.layout.sp, p.layout.dp) for p in points}
    assert found == {(1, 1, 4), (1, 2, 2), (1, 4, 1), (2, 1, 2), (2, 2, 1)}
    assert len(points) + left_out.total() == 3 * 3 * 2
    assert all(p.layout.kernel == "cpu" for p in points)


def test_a_listed_layout_is_a_row_though_it_cannot_be():
    points, left_out = space(layouts=[{"ranks": 4, "seq-length": 64, "tp": 3}]).points("cpu", MODEL)
    assert (len(points), left_out.total()) == (1, 0)


def test_doubles_are_one_row():
    """Without SP a schedule changes nothing."""
    grid = {"ranks": 4, "seq-length": 64, "sp": [1, 4], "schedule": ["ring", "balanced"]}
    points, _ = space(grid=grid, layouts=[grid]).points("cpu", MODEL)
    assert [(p.layout.sp, p.layout.schedule) for p in points] == [
        (1, "auto"),
        (4, "ring"),
        (4, "balanced"),
    ]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, "give grid or layouts"),
        ({"grid": {"ranks": 4}}, "seq-length"),
        ({"grid": {"ranks": 4, "seq-length": 8, "recompute": "half"}}, "accepted values are none"),
        ({"grid": {"ranks": 4, "seq-length": 8, "zero": 5}}, "accepted values are 0, 1, 2, 3"),
        ({"grid": {"ranks": 4, "seq-length": 8, "tp-sp": "yes"}}, "true and false"),
        ({"grid": {"ranks": "four", "seq-length": 8}}, "not a whole number"),
    ],
)
def test_wrong_spaces(changes, says):
    with pytest.raises(ValueError, match=says):
        space(**changes)


def row(seconds: float | None, **layout) -> dict:
    """The CSV's row of a run of a layout over 4 ranks."""
    point = Point(64, Layout(4, **layout))
    stored = {"model": "m", "key": "k" * 12, "reason": "", "status": "ok", "step_time_s": seconds,
              "step_time_spread": 0.0, "tokens_per_s": 1.0, "memory_since_start_bytes": 2**20,
              "bytes_sent_per_step": 0.0, "versions": {"torch": "2"}, "dtype": "float32",
              "losses": [2.0, 1.0], "device": {"kind": "cpu", "name": "CPU"}}  # fmt: skip
    if seconds is None:
        stored = {"model": "m", "key": "", "reason": "took\ntoo much", "status": "oom"}
    return csv_row(stored, point, MODEL, "sweep", 4, Peak(1e9, "measured", ""))


def test_the_csv_has_the_columns_that_the_planner_reads(tmp_path):
    assert set(COLUMNS) >= STUDY
    write_csv(tmp_path / "s.csv", [row(2.0, tp=2, sp=2, tp_sp=True), row(None, recompute="full")])
    with (tmp_path / "s.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["tp"], first["sp"], first["dp"], first["seq_parallel"]) == ("2", "2", "1", "True")
    assert (first["act_ckpt"], first["status"], first["num_microbatches"]) == ("none", "ok", "4")
    flops = model_flops(MODEL, 64, 4)
    assert float(first["mfu"]) == pytest.approx(flops / (2.0 * 4 * 1e9), rel=1e-5)
    assert (second["act_ckpt"], second["status"], second["mfu"]) == ("every_layer", "oom", "")
    assert second["reason"] == "took too much"


def test_effects_are_of_pairs_that_differ_in_one_choice():
    rows = [
        row(1.0, tp=1),
        row(3.0, tp=2),
        row(1.5, tp=2, tp_sp=True),
        row(2.0, sp=2),
        row(5.0, sp=2, tp=2),
        row(None, sp=4),
        row(1.2, recompute="attention-output"),
        row(1.4, recompute="full"),
    ]
    found = {(e.factor, e.before, e.after): e.ratios for e in report.effects(rows)}
    assert found == {
        ("tp", "1", "2"): (3.0, 2.5),
        ("sp", "1", "2"): (2.0, pytest.approx(5 / 3)),
        ("seq_parallel", "False", "True"): (0.5,),
        ("recompute", "none", "attention-output"): (1.2,),
        ("recompute", "none", "full"): (1.4,),
    }


def test_report_and_picture(tmp_path):
    rows = [row(1.0), row(2.0, sp=2), row(None, tp=2)]
    (table,) = report.best_tables(rows, 10)
    assert table.row_count == 2
    assert "2 ok" in table.title
    assert "1 oom" in table.title
    assert report.failure_table(rows).row_count == 1
    assert report.failure_table(rows[:2]) is None
    plot.plot(rows, "title", tmp_path / "s.png")
    plot.plot([row(None)], "nothing ran", tmp_path / "none.png")
    assert (tmp_path / "s.png").stat().st_size > 10_000


SBATCH = """#!/bin/bash
# what SLURM does, on this machine: says a number, runs the script, leaves with its status
echo "$@" > "$STAND_IN/asked"
echo "17;here"
script="${@: -1}"
output="$(sed -n 's/^#SBATCH --output=//p' "$script")"
SLURM_JOB_ID=17 SLURM_JOB_NUM_NODES=2 SLURM_JOB_NODELIST=x bash "$script" > "$output" 2>&1
"""
SRUN = '#!/bin/bash\nSLURM_NODEID=0 exec "$@"\n'
SCONTROL = "#!/bin/bash\nprintf 'first\\nsecond\\n'\n"


@pytest.fixture
def slurm_here(tmp_path, monkeypatch):
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("scontrol", SCONTROL)):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("STAND_IN", str(tmp_path))
    return tmp_path


def test_a_row_is_submitted_waited_for_and_read(slurm_here):
    run = slurm.submit(Slurm(directives=("--partition=a100",), setup=("export SAID=yes",)))
    said: list[str] = []
    task = job(slurm_here, REPORT + "\nimport os\nassert os.environ['SAID'] == 'yes'\n", seconds=90)
    outcome = run(task, slurm_here / "run", said.append)
    assert (outcome.status, outcome.steps_seen) == ("ok", 1), outcome.reason
    assert said == ["    submitted as job 17"]
    assert "--wait" in (slurm_here / "asked").read_text()
    assert "--time=2" in (slurm_here / "asked").read_text()
    text = (slurm_here / "run" / "job.sh").read_text()
    assert "#SBATCH --partition=a100" in text
    subprocess.run(["bash", "-n", str(slurm_here / "run" / "job.sh")], check=True)


def test_a_job_that_fails_says_why(slurm_here):
    run = slurm.submit(Slurm())
    outcome = run(
        job(slurm_here, "raise RuntimeError('CUDA out of memory')"), slurm_here / "r", print
    )
    assert isinstance(outcome, Outcome)
    assert outcome.status == "oom"


def test_several_nodes_meet_at_the_first(slurm_here, tmp_path):
    """The launcher's real command, which the stand-in srun prints in its own place."""
    from megatron_seqpar.experiments.job import Job

    task = Job("x", 16, ("--lr", "1 0"), Path("train.py"), "cuda")
    text = slurm.batch_script(task, Slurm(srun=("srun", "echo")), tmp_path)
    assert "#SBATCH --nodes=2" in text
    (tmp_path / "job.sh").write_text(text)
    there = {
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SEQPAR_MASTER": "first",
        "SEQPAR_PORT": "20017",
    }
    done = subprocess.run(
        ["bash", str(tmp_path / "job.sh")],
        env={**os.environ, **there, "SLURM_JOB_ID": "17"},
        capture_output=True,
        text=True,
        check=True,
    )
    inner = done.stdout.strip().removeprefix("bash -c ")
    shown = subprocess.run(
        ["bash", "-c", inner.replace(sys.executable, "printf '%s\\n'", 1)],
        env={**os.environ, **there, "SLURM_NODEID": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert "--nnodes 2 --node-rank 1 --master-addr first --master-port 20017" in shown
    assert shown[shown.index("--nproc") + 1] == "8"
    assert shown[shown.index("--lr") + 1] == "1 0"


def test_no_sbatch_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SeqParError, match="no sbatch on PATH"):
        slurm.check_slurm()
    with pytest.raises(SeqParError, match="ranks-per-node 8"):
        slurm.batch_script(job(tmp_path, "", ranks=12), Slurm(), tmp_path)
