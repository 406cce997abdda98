# SPDX-License-Identifier: Apache-2.0
"""The report of real runs of the project's own script, through the launcher."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS = 3
MODEL = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 64 "
    "--max-position-embeddings 64 --micro-batch-size 1 --global-batch-size 2 --mock-data "
    "--tokenizer-type NullTokenizer --vocab-size 256 --hidden-dropout 0 --attention-dropout 0 "
    f"--train-iters {STEPS} --lr 1e-3 --eval-iters 0 --eval-interval 1000 --log-interval 1 "
    "--use-cpu-initialization --no-create-attention-mask-in-dataloader --num-workers 0"
).split()

SPLIT = (
    *("--seqpar-schedule", "balanced", "--seqpar-kernel", "cpu", "--calculate-per-token-loss"),
    *("--seqpar-peak-tflops", "0.5", "--seqpar-no-summary"),
)
# a step of 128 tokens of MODEL: 6 FLOPs a weight and token, 12 a layer, key, head and dim of it
WEIGHTS = 2 * (4 * 32 * 32 + 2 * 32 * 128) + 256 * 32
ATTENTION = 12 * 2 * 32 * 64 * 128
FLOPS = 6 * WEIGHTS * 128 + ATTENTION
CAUSAL_FLOPS = 6 * WEIGHTS * 128 + ATTENTION * 65 / 128


def run(report: Path, ranks: int, *arguments: str) -> tuple[dict[str, Any], str]:
    command = [
        *(sys.executable, "-m", "megatron_seqpar", "run", "--device", "cpu"),
        *("--nproc", str(ranks), "scripts/pretrain_gpt.py", *MODEL, *arguments),
        *("--seqpar-report", str(report)),
    ]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(report.read_text(encoding="utf-8")), done.stdout


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    return run(tmp_path_factory.mktemp("one") / "deep" / "report.json", 1)


@pytest.fixture(scope="module")
def piped(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """Two pipeline stages: only the second knows the loss, and the first writes the file."""
    folder = tmp_path_factory.mktemp("two")
    return run(folder / "report.json", 2, "--pipeline-model-parallel-size", "2")


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """The sequence split over two ranks."""
    folder = tmp_path_factory.mktemp("split")
    return run(folder / "report.json", 2, "--sequence-parallel-size", "2", *SPLIT)


def test_steps(one: tuple[dict[str, Any], str]) -> None:
    report, _ = one
    assert [step["iteration"] for step in report["steps"]] == [1, 2, 3]
    assert all(step["tokens"] == 128 and not step["skipped"] for step in report["steps"])
    assert all(step["seconds"] > 0 and step["grad_norm"] > 0 for step in report["steps"])


def test_losses_are_those_of_the_log_but_exact(one: tuple[dict[str, Any], str]) -> None:
    report, output = one
    logged = [float(x) for x in re.findall(r"lm loss: (\S+)", output)]
    losses = [step["loss"] for step in report["steps"]]
    assert losses[0] == pytest.approx(logged[0], rel=1e-6)
    assert losses[2] == pytest.approx(logged[2], rel=1e-6)  # the second is a mean of two
    printed = [float(x) for x in re.findall(r"\[seqpar\] step \d/3, loss ([\d.]+)", output)]
    assert printed == [round(loss, 6) for loss in losses]


def test_summary(one: tuple[dict[str, Any], str]) -> None:
    report, output = one
    summary = report["summary"]
    assert summary["timed_steps"] == STEPS - 1  # the first warms up
    assert summary["bytes_sent_per_rank_and_step"] == 0
    assert summary["tokens_per_second"] == pytest.approx(128 / summary["seconds_per_step"])
    assert summary["peak_memory_bytes"] > 2**20
    assert "run of 3 steps on 1 ranks" in output
    assert report["device"]["kind"] == "cpu"
    assert report["versions"]["megatron-core"].startswith("0.19")


def test_utilization_of_a_measured_peak(one: tuple[dict[str, Any], str]) -> None:
    report, output = one
    summary = report["summary"]
    assert summary["model_flops_per_step"] == FLOPS
    assert summary["causal_model_flops_per_step"] == CAUSAL_FLOPS
    assert (summary["peak_basis"], summary["mfu_note"]) == ("measured", None)
    assert "matrices in float32, threads 1" in summary["peak_source"]
    assert 1e8 < summary["peak_flops_per_rank"] < 1e13
    ceiling = summary["seconds_per_step"] * summary["peak_flops_per_rank"]
    assert summary["mfu"] == pytest.approx(FLOPS / ceiling)
    assert summary["causal_mfu"] == pytest.approx(CAUSAL_FLOPS / ceiling)
    assert (
        len(re.findall(r"\[seqpar\] step .* tokens/s, MFU [\d.]+% \(causal [\d.]+%\)", output)) == 3
    )
    assert re.search(
        r"  MFU  +[\d.]+% \(causal [\d.]+%\) of [\d.]+ .FLOP/s a rank, measured", output
    )


def test_utilization_of_a_given_peak_is_that_of_all_ranks(
    split: tuple[dict[str, Any], str],
) -> None:
    report, output = split
    summary = report["summary"]
    assert (summary["peak_flops_per_rank"], summary["peak_basis"]) == (0.5e12, "given")
    assert summary["peak_source"] == "--seqpar-peak-tflops 0.5"
    assert summary["mfu"] == pytest.approx(FLOPS / (2 * 0.5e12 * summary["seconds_per_step"]))
    assert "run of 3 steps" not in output  # --seqpar-no-summary


def test_the_last_stage_gives_the_losses(piped: tuple[dict[str, Any], str]) -> None:
    report, output = piped
    logged = [float(x) for x in re.findall(r"lm loss: (\S+)", output)]
    assert report["steps"][0]["loss"] == pytest.approx(logged[0], rel=1e-6)
    assert report["steps"][2]["loss"] == pytest.approx(logged[2], rel=1e-6)
    assert len(re.findall(r"\[seqpar\] step", output)) == STEPS  # said once, not once a rank


def test_bytes_between_stages_are_the_activations(piped: tuple[dict[str, Any], str]) -> None:
    report = piped[0]
    assert report["parallel"] == {
        "world": 2,
        "sequence": 1,
        "tensor": 1,
        "tensor_sequence": False,
        "pipeline": 2,
        "data": 1,
    }
    activation = 64 * 32 * 4  # tokens x hidden x bytes of fp32; two micro-batches a step
    for rank in report["ranks"]:  # forward from the first stage, gradients from the second
        assert rank["traffic_by_kind"]["send"] == {
            "calls": 2 * STEPS,
            "bytes": 2 * STEPS * activation,
        }


def test_the_axis_gives_the_losses_of_one_rank(
    one: tuple[dict[str, Any], str], split: tuple[dict[str, Any], str]
) -> None:
    assert split[0]["parallel"]["sequence"] == 2
    assert [s["loss"] for s in split[0]["steps"]] == pytest.approx(
        [s["loss"] for s in one[0]["steps"]], rel=1e-6
    )


def test_bytes_and_messages_of_the_axis_are_the_schedules(
    split: tuple[dict[str, Any], str],
) -> None:
    import torch

    from megatron_seqpar.attention import Causal, build_schedule

    schedule = build_schedule(
        "balanced",
        size=2,
        seq_length=64,
        mask=Causal(),
        query_heads=4,
        kv_heads=4,
        head_dim=8,
    )
    calls = 2 * 2 * STEPS  # layers x micro-batches x steps
    for record in split[0]["ranks"]:
        rank = record["rank"]
        both = ("forward", "backward")
        sent = sum(schedule.bytes_sent(rank, way, torch.float32) for way in both)
        messages = sum(schedule.messages_sent(rank, way) for way in both)
        expected = {"calls": calls * messages, "bytes": calls * sent}
        assert record["traffic_by_kind"]["send"] == expected
        assert record["traffic_by_group"]["SEQUENCE_PARALLEL_GROUP"] == expected


def test_nothing_half_written(tmp_path: Path) -> None:
    from megatron_seqpar.integration import report

    class Unwritable:
        pass

    with pytest.raises(TypeError):
        report.write({"steps": Unwritable()}, tmp_path / "report.json")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_refused_as_a_file(tmp_path: Path) -> None:
    from megatron_seqpar.errors import SeqParError
    from megatron_seqpar.integration import report

    with pytest.raises(SeqParError, match="not a file that can be written"):
        report.install(tmp_path)
