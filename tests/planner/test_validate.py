# SPDX-License-Identifier: Apache-2.0
"""Scores by hand, and rows that come back as they were with four columns more."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from megatron_seqpar.attention.kernels import names
from megatron_seqpar.errors import SeqParError
from megatron_seqpar.planner.runs import Run, read_runs, run_of
from megatron_seqpar.planner.validate import (
    COLUMNS,
    Predicted,
    kendall_tau,
    predict_runs,
    score,
    write_predictions,
)

from .models import cluster

ROW = {
    "model": "llama_13B", "hidden": "5120", "layers": "40", "heads": "40", "ffn": "13824",
    "seq_len": "2048", "global_batch": "2048", "world_size": "64", "tp": "2", "pp": "1",
    "dp": "32", "micro_batch": "1", "num_microbatches": "64.0", "act_ckpt": "none",
    "kernel": "flash_attention2 + RMS kernel", "seq_parallel": "False", "status": "ok",
    "step_time_s": "31.25",
}  # fmt: skip


def run(status: str, seconds: float | None, **changes: str) -> Run:
    time = "" if seconds is None else str(seconds)
    return run_of({**ROW, "status": status, "step_time_s": time, **changes})


def predicted(status: str, measured: float | None, fits: bool, time: float) -> Predicted:
    return Predicted(run(status, measured), 1.0, fits, time, 0.5)


def test_scores_by_hand() -> None:
    rows = [
        predicted("oom", None, True, 9.0),  # the predicted fastest, and it does not fit
        predicted("ok", 12.0, True, 10.0),
        predicted("ok", 10.0, True, 11.0),  # beyond what counts as equally fast
        predicted("ok", 20.0, False, 22.0),
        predicted("oom", None, False, 8.0),
        predicted("kernel_not_available", None, True, 1.0),
    ]
    scores = score(rows, "by hand")
    assert (scores.finished, scores.out_of_memory, scores.others) == (3, 2, 1)
    assert scores.oom_precision == 0.5
    assert scores.oom_recall == 0.5
    assert scores.mape == pytest.approx((2 / 12 + 1 / 10 + 2 / 20) / 3)
    assert scores.tau == pytest.approx(1 / 3)
    assert scores.regret == pytest.approx(0.2)
    assert scores.regret_of_3 == 0
    assert scores.top1_oom is True


def test_nothing_to_say_is_none_and_not_zero() -> None:
    scores = score([predicted("other_error", None, True, 1.0)], "nothing")
    assert scores.mape is scores.tau is scores.regret is scores.oom_recall is None
    assert scores.top1_oom is None


def test_kendall_tau_counts_ties() -> None:
    assert kendall_tau([(1, 1), (2, 2), (3, 3)]) == 1
    assert kendall_tau([(1, 3), (2, 2), (3, 1)]) == -1
    # one pair of four tied on the left: 5 / sqrt(5 x 6)
    assert kendall_tau([(1, 1), (1, 2), (3, 3), (4, 4)]) == pytest.approx(5 / 30**0.5)
    assert kendall_tau([(1, 1)]) is None


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    source, target = tmp_path / "sheet.csv", tmp_path / "out.csv"
    rows = [
        {**ROW, "note": "0.10, kept"},
        {**ROW, "status": "oom", "step_time_s": "", "micro_batch": "8", "note": ""},
        {**ROW, "status": "other_error", "step_time_s": "", "tp": "3", "pp": "1", "note": "x"},
    ]
    with source.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    write_predictions(predict_runs(read_runs([source]), cluster()), target)
    with target.open(newline="") as file:
        written = list(csv.DictReader(file))
    assert [{k: row[k] for k in rows[0]} for row in written] == rows
    assert list(written[0])[-4:] == list(COLUMNS)
    assert float(written[0]["pred_step_time_s"]) > 0
    assert 0 < float(written[0]["pred_mfu"]) < 1
    assert written[1]["pred_fits"] == "False"
    # 40 heads cannot be shared out over 3: nothing to predict
    assert [written[2][name] for name in COLUMNS] == ["", "False", "", ""]


def test_mfu_obeys_the_sheets_identity() -> None:
    """mfu = (6 N + 12 L h s) tokens / (t W 312e12), N with both embeddings of 128,000 rows."""
    [one] = predict_runs([run("ok", 31.25)], cluster())
    layer = 4 * 5120**2 + 3 * 5120 * 13824
    weights = 40 * layer + 2 * 128_000 * 5120
    flops = (6 * weights + 12 * 40 * 5120 * 2048) * 2048 * 2048
    assert one.time is not None
    assert one.mfu == pytest.approx(flops / (one.time * 64 * 312e12), rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"hidden": ""}, "column hidden: missing"),
        ({"tp": "two"}, "column tp: 'two' is no number"),
        ({"kernel": "magic"}, "column kernel: 'magic': use torch"),
        ({"status": ""}, "column status: missing"),
    ],
)
def test_a_wrong_column_is_named(changes: dict[str, str], text: str) -> None:
    with pytest.raises(SeqParError, match=text):
        run_of({**ROW, **changes})


@pytest.mark.parametrize(
    ("kernel", "name", "fused"),
    [
        ("flash_attention2 + RMS kernel", "flash2", True),
        ("flash_attention2", "flash2", False),
        ("flash_attentionv1.0.8", "flash1", False),
        ("flash_attention", "flash1", False),
        ("fused", "fused", False),
        ("torch", "torch", False),
    ],
)
def test_kernels_of_the_sheets(kernel: str, name: str, fused: bool) -> None:
    layout = run("ok", 1.0, kernel=kernel).layout
    assert (layout.kernel, layout.fused_norm) == (name, fused)


def test_rows_of_a_sweep_are_megatrons() -> None:
    """They have a column `loss_chunks`; what the study's rows lack is read."""
    row = {
        **ROW, "kernel": "stock", "sp": "2", "cp": "1", "ep": "1", "vpp": "1", "dp": "16",
        "schedule": "ulysses+zigzag", "recompute": "attention-output", "zero": "1",
        "mlp_chunks": "off", "loss_chunks": "8", "kv_heads": "8", "head_dim": "128",
        "vocab": "32000", "dtype": "bfloat16",
    }  # fmt: skip
    layout = run_of(row).layout
    assert (layout.sp, layout.dp, layout.schedule) == (2, 16, "zigzag")
    assert (layout.recompute, layout.loss_chunks, layout.mlp_chunks) == ("attention-output", 8, 0)
    assert layout.parallel_loss
    assert layout.fused_loss
    assert not layout.plain_layers
    assert layout.gradient_bytes == 4
    assert layout.fused_norm
    assert run_of({**row, "sp": "1", "cp": "2", "schedule": ""}).layout.schedule == "zigzag"
    assert run_of({**row, "kernel": "unfused", "dtype": "float32"}).layout.kernel == "torch"
    assert predict_runs([run_of({**row, "loss_chunks": "auto"})], cluster())[0].time is not None


def test_every_kernel_of_this_project_is_known() -> None:
    for name in names():
        kernel = run("ok", 1.0, kernel=name).layout.kernel
        assert kernel == ("torch" if name == "reference" else "flash2"), name
