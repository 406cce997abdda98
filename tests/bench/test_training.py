# SPDX-License-Identifier: Apache-2.0
"""`bench step` and `bench memory`: tiny real runs, and what is known before a run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megatron_seqpar.bench import memory, step
from megatron_seqpar.bench.prepare import prepare
from megatron_seqpar.bench.training import (
    described,
    left_out,
    rates,
    unfused_gib,
)
from megatron_seqpar.data import VOCABULARY_SIZE, Corpus
from megatron_seqpar.experiments.execute import Outcome
from megatron_seqpar.experiments.machine import Machine
from megatron_seqpar.experiments.training import Training
from megatron_seqpar.mfu import model_flops, model_from_flags, peak_of
from megatron_seqpar.shipped import model_file
from tests.bench.command import bench, refused

CPU, GPU = Machine("cpu", "", 1), Machine("cuda", "NVIDIA H100 80GB HBM3", 1)
CORPUS = Corpus("data", 1, 1, 1, 0, 0, False)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small text, so that no run waits for the whole library."""
    path = tmp_path_factory.mktemp("text") / "my.jsonl"
    lines = [json.dumps({"text": f"document {i}: " + "some words " * 100}) for i in range(20)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def training(model: str, length: int = 4096, **changes: Any) -> Training:
    return Training(model_file(model), CORPUS, Path("cache"), 2, length, 1, changes=changes)


# ---- runs -----------------------------------------------------------------------------------


def test_step(text: Path, tmp_path: Path) -> None:
    output = bench(
        *("step", "--device", "cpu", "--ranks", "2", "--tokens", "64", "--steps", "2"),
        *("--model", "quickstart", "--layers", "1", "--ways", "stock;SP=2", "--data", text),
        *("--stock-limit-gib", "0", "--work", tmp_path / "work"),
        *("--json", tmp_path / "r.json", "--plot", tmp_path / "r.png"),
    )
    assert "64 tokens, stock: left out: unfused attention needs" in output
    result = json.loads((tmp_path / "r.json").read_text())
    assert (tmp_path / "r.png").stat().st_size > 10_000
    stock, split = result["rows"]
    assert (stock["status"], split["status"]) == ("left out", "ok")
    assert (split["way"], split["ranks"], split["sp"], split["tp"]) == ("SP=2", 2, 2, 1)
    assert result["settings"]["layers"] == 1
    assert split["seconds_by_round"] == [split["seconds"]]
    assert split["tokens_per_second"] == pytest.approx(64 / split["seconds"])
    assert split["time_over"] == {"stock": None}
    assert len(split["losses"]) == 2
    assert split["bytes_sent_per_step"] > 0
    values = training("quickstart", **{"num-layers": 1}).model_flags()
    model = model_from_flags({**values, "vocab-size": VOCABULARY_SIZE})
    rate = split["model_tflops_per_rank"] * 1e12
    assert rate == pytest.approx(model_flops(model, 64) / split["seconds"] / 2)
    assert split["peak"]["basis"] == "measured"  # none is published for a CPU
    assert split["mfu"] == pytest.approx(rate / split["peak"]["value"])


@pytest.mark.slow
def test_memory(text: Path, tmp_path: Path) -> None:
    bench(
        *("memory", "--device", "cpu", "--ranks", "1", "--tokens", "2048", "--steps", "2"),
        *("--model", "quickstart", "--data", text, "--accounts", "--chunks", "2"),
        *("--ways", "stock;none;attention-output + mini-sequence", "--stock-limit-gib", "0"),
        *("--work", tmp_path / "work"),
        *("--json", tmp_path / "r.json", "--plot", tmp_path / "r.png"),
    )
    stock, none, least = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [row["status"] for row in (stock, none, least)] == ["left out", "ok", "ok"]
    assert none["time_over"] == {"none": 1.0, "full recompute": None}
    assert least["time_over"]["none"] == pytest.approx(least["seconds"] / none["seconds"])
    assert least["allocator_peak_bytes"] < none["allocator_peak_bytes"]
    assert least["largest_loss_difference"] < 1e-5
    assert (tmp_path / "r.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_run_without_memory_is_an_oom_and_one_that_takes_long_is_too_slow(
    text: Path, tmp_path: Path
) -> None:
    here = prepare(
        "cpu", "quickstart", None, str(text), tmp_path, None, None, None, Console(quiet=True)
    )
    way = memory.ways_of(1, 2, here.kernel)["none"]
    outcome = here.trainer.run(way, here.training(4096, 2, {}), lambda line: None, cap_mib=1)
    assert described(way, outcome)["status"] == "oom"
    hasty = replace(here.trainer, seconds=1.0)
    outcome = hasty.run(way, here.training(256, 2, {}), lambda line: None)
    assert described(way, outcome)["status"] == "too slow"


@pytest.mark.slow
def test_layers_that_fit_are_found_by_training(text: Path, tmp_path: Path) -> None:
    """Both layers of a small model fit a large memory; the peaks are those of real runs."""
    here = prepare(
        "cpu", "quickstart", None, str(text), tmp_path, None, None, None, Console(quiet=True)
    )
    ways = step.ways_of(1, 2, here.kernel)
    found = step.fit_layers(here.trainer, ways, here.training(256, 2, {}), 2**40)
    assert found.layers == 2
    assert {layers: status for layers, (status, _) in found.tries.items()} == {1: "ok", 2: "ok"}
    assert all(peak and peak > 2**20 for _, peak in found.tries.values())


# ---- before a run ---------------------------------------------------------------------------


def test_the_models_own_vocabulary_comes_last() -> None:
    """Bytes need 257 rows; a model that has more must have its head measured whole."""
    arguments = training("llama3-8b").arguments()
    last = len(arguments) - 1 - arguments[::-1].index("--vocab-size")
    assert arguments[last + 1] == "128256"
    own = training("quickstart").arguments()
    assert own[own.index("--vocab-size") + 1] == str(VOCABULARY_SIZE)


def test_layers_are_those_asked_for() -> None:
    arguments = training("llama3-8b", **{"num-layers": 3}).arguments()
    assert arguments[arguments.index("--num-layers") + 1] == "3"


def test_ways_of_a_step() -> None:
    one, two = step.ways_of(1, 4, "k"), step.ways_of(2, 4, "k")
    assert list(two)[: len(one)] == list(one)
    assert set(step.defaults(2, "cpu")) < set(two)
    assert step.defaults(1, "cuda") == list(one)
    assert two["stock"].layout.arguments() == []
    assert two["TP=2 + TP-SP, stock"].layout.arguments() == [
        *("--tensor-model-parallel-size", "2", "--sequence-parallel"),
    ]
    assert step.frugal_way(two).layout.arguments() == [
        *("--sequence-parallel-size", "2", "--seqpar-recompute", "attention-output"),
        *("--seqpar-mlp-chunks", "4", "--seqpar-loss-chunks", "4", "--seqpar-kernel", "k"),
    ]
    assert step.frugal_way(one).layout.ranks == 1


def test_what_is_left_out_and_why() -> None:
    ways = step.ways_of(8, 4, "k")
    long = training("llama3-8b", 2**17)
    assert left_out(ways["SP=1"], CPU, long, 1, 1.0) is None
    assert "needs about 10,240 GiB" in str(
        left_out(ways["stock, full recompute"], CPU, long, 1, 1e4)
    )
    assert left_out(ways["stock, full recompute"], CPU, long, 1, 1e9) is None
    # a GPU's scores are of 16 bits, and eight GPUs hold eight times as much
    needed = unfused_gib(long.model_flags(), 2**17, full=False, item=2)
    assert left_out(ways["TP=8, stock"], GPU, long, 1, needed / 7) is None
    assert left_out(ways["stock"], GPU, long, 1, needed / 7) is not None
    odd = training("llama2-33-heads")
    assert "TP 8 does not divide 33" in str(left_out(ways["TP=8"], GPU, odd, 1, 1.0))
    offload = memory.ways_of(1, 4, "k")["attention-output + mini-sequence + offload"]
    assert "needs a GPU" in str(left_out(offload, CPU, long, 1, 1.0))
    assert left_out(offload, GPU, long, 1, 1.0) is None
    split = memory.ways_of(2, 4, "k")["stock"]
    assert "Transformer Engine" in str(left_out(split, CPU, long, 1, 1.0))


def test_unfused_attention_counts_its_matrices() -> None:
    values = {"num-layers": 3, "num-attention-heads": 4}
    assert unfused_gib(values, 2**14, full=True) == 5 * 4
    assert unfused_gib(values, 2**14, full=False) == (5 + 2 * 3) * 4


def test_mfu_is_of_the_peak() -> None:
    row = {"seconds": 2.0}
    large = training("llama3-8b", 8192)
    work = model_flops(model_from_flags(large.model_flags()), 8192)
    peak = peak_of(GPU.name, "bfloat16")
    assert peak is not None
    assert peak.basis == "published"
    found = rates(large, row, 2, peak)
    assert found["mfu"] == pytest.approx(work / 4 / 989e12, rel=0.01)
    assert found["mfu_causal"] < found["mfu"]
    assert found["model_tflops_per_rank"] == pytest.approx(work / 4 / 1e12)
    unknown = rates(large, row, 2, None)
    assert unknown["mfu"] is None
    assert unknown["peak"] is None


def test_endings_of_runs() -> None:
    way = step.ways_of(1, 1, "k")["SP=1"]
    for outcome, status in (
        (Outcome("oom", "out of memory"), "oom"),
        (Outcome("error", "timeout: took longer than 3 s"), "too slow"),
        (Outcome("error", "a flag is wrong"), "error"),
    ):
        assert described(way, outcome) == {"status": status, "why": outcome.reason}


def test_refusals(tmp_path: Path) -> None:
    cpu = ("step", "--device", "cpu")
    assert "--layers fit: needs a GPU" in refused(*cpu, "--layers", "fit")
    assert "--layers 2,3: give one number" in refused(*cpu, "--layers", "2,3")
    assert "--layers some" in refused(*cpu, "--layers", "some")
    assert "SP=2, recompute + chunks" in refused(*cpu, "--ways", "SP=3")
    assert "--model nothing" in refused(*cpu, "--model", "nothing")
    assert "--script none.py: no such file" in refused(*cpu, "--script", "none.py")
    assert "is a folder" in refused(*cpu, "--json", tmp_path)
    (tmp_path / "file").touch()
    assert "cannot be written" in refused(*cpu, "--json", tmp_path / "file" / "r.json")
    assert "name a .png, .svg, .pdf file" in refused(*cpu, "--plot", "r.txt")
    assert "without torchrun" in refused(*cpu, RANK="0", WORLD_SIZE="2")
    assert "--device gpu" in refused("memory", "--device", "gpu")
