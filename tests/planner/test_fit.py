# SPDX-License-Identifier: Apache-2.0
"""Calibration finds constants again, is held by its priors, and writes a file that reads back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_seqpar.errors import ClusterError, SeqParError
from megatron_seqpar.planner import Basis, Cluster, Constants
from megatron_seqpar.planner.constants import prior_of
from megatron_seqpar.planner.constants_file import read_planner_cluster, save_planner_cluster
from megatron_seqpar.planner.estimate import peak_memory, step_time
from megatron_seqpar.planner.fit import calibrate
from megatron_seqpar.planner.runs import Run, run_of

from .models import cluster
from .test_validate import ROW


def truth() -> Cluster:
    """A cluster whose constants differ from the priors."""
    values = {"gemm_share": 0.7, "wide_traffic": 80.0, "logit_bytes": 24.0, "context_bytes": 4e9}
    return replace(cluster(), constants=Constants().changed(values), origins={})


def made_up(real: Cluster) -> list[Run]:
    """What `real` would do under a grid of layouts."""
    runs = []
    for tp in (1, 2, 4):
        for pp in (1, 2, 4):
            for micro in (1, 2, 4, 8):
                for act in ("none", "every_layer"):
                    changes = {"tp": tp, "pp": pp, "micro_batch": micro, "act_ckpt": act}
                    row = {**ROW, **{name: str(value) for name, value in changes.items()}}
                    run = run_of(row)
                    fits = peak_memory(run.model, real, run.layout) <= real.capacity.value
                    time = step_time(run.model, real, run.layout).total
                    row["status"] = "ok" if fits else "oom"
                    row["step_time_s"] = str(time) if fits else ""
                    runs.append(run_of(row))
    return runs


def test_it_predicts_what_it_was_fitted_to() -> None:
    real = truth()
    runs = made_up(real)
    assert {run.status for run in runs} == {"ok", "oom"}
    fitted = calibrate(replace(real, constants=Constants()), runs, "made up").cluster
    for run in runs:
        if run.ok:
            time = step_time(run.model, fitted, run.layout).total
            assert time == pytest.approx(run.step_time, rel=0.02)
        else:
            assert peak_memory(run.model, fitted, run.layout) > 0.98 * fitted.capacity.value
    assert fitted.constants.gemm_share == pytest.approx(0.7, rel=0.05)
    assert fitted.origin("gemm_share").basis is Basis.CALIBRATED
    # nothing in these runs says anything of these
    assert "torch_traffic" not in fitted.origins
    assert fitted.origin("torch_traffic").basis is Basis.ASSUMED


def test_three_rows_already_help_and_do_not_run_away() -> None:
    real = truth()
    runs = [run for run in made_up(real) if run.ok][:3]
    start = replace(real, constants=Constants())
    fitted = calibrate(start, runs, "three").cluster

    def off(described: Cluster) -> float:
        layouts = [run for run in made_up(real) if run.ok]
        times = [step_time(run.model, described, run.layout).total for run in layouts]
        return max(abs(t / run.step_time - 1) for t, run in zip(times, layouts, strict=True))

    assert off(fitted) < off(start)
    for name in fitted.origins:
        value, spread = prior_of(name)
        assert value / (1 + 4 * spread) < getattr(fitted.constants, name) < value * (1 + 4 * spread)


def test_assumed_values_of_the_file_are_the_priors_of_a_calibration() -> None:
    """What was calibrated before is not, or the same rows would count twice."""
    hopper = cluster("dgx-h100")
    runs = [run for run in made_up(truth()) if run.ok and run.layout.tp == 1][:1]
    fitted = calibrate(hopper, runs, "one")
    assert fitted.cluster.constants.wide_traffic == pytest.approx(
        hopper.constants.wide_traffic, rel=0.2
    )
    again = calibrate(fitted.cluster, runs, "one").cluster
    fresh = calibrate(replace(fitted.cluster, origins={}), runs, "one").cluster
    assert again.constants.wide_traffic == pytest.approx(fresh.constants.wide_traffic, rel=1e-6)


def test_no_row_of_use_is_an_error() -> None:
    with pytest.raises(SeqParError, match="no row with status ok or oom"):
        calibrate(cluster(), [run_of({**ROW, "status": "other_error"})], "nothing")


def test_the_file_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    fitted = calibrate(truth(), made_up(truth())[:6], "six runs").cluster
    save_planner_cluster(fitted, path)
    again = read_planner_cluster(path)
    for name in fitted.origins:
        assert getattr(again.constants, name) == pytest.approx(
            getattr(fitted.constants, name), rel=1e-3
        )
        assert again.origin(name) == fitted.origin(name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cluster: dgx-a100\n", "memory_gib"),
        ("memory_gib: {value: 1, basis: assumed, source: x}\n", "says nothing of 'cluster'"),
        (
            "cluster: dgx-a100\nmemory_gib: {value: -1, basis: assumed, source: x}\n",
            "a number above 0",
        ),
        (
            "cluster: dgx-a100\nmemory_gib: {value: 1, basis: guessed, source: x}\n",
            "use one of measured, calibrated",
        ),
        (
            "cluster: dgx-a100\nmemory_gib: {value: 1, basis: assumed, source: x}\n"
            "constants: {speed: {value: 1, basis: assumed, source: x}}\n",
            "constants.speed: unknown",
        ),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(ClusterError, match=message):
        read_planner_cluster(path)


@pytest.mark.parametrize("name", ["tpu-v5", "pcie-box", "laptop"])
def test_unknown_hardware_is_refused(name: str) -> None:
    with pytest.raises(ClusterError, match="unknown hardware; use one of"):
        read_planner_cluster(name)
