# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest

from megatron_seqpar.data import Corpus
from megatron_seqpar.errors import SeqParError
from megatron_seqpar.mfu import read_flags
from megatron_seqpar.quickstart import machine
from megatron_seqpar.quickstart.machine import Machine
from megatron_seqpar.quickstart.plan import Run, Training, flags, left_out, plan

MODEL = Path(__file__).parents[2] / "configs" / "models" / "quickstart.yaml"


def training(steps: int = 5) -> Training:
    corpus = Corpus("data/x_text_document", 1, 2, 3, 0, 0)
    return Training(MODEL, corpus, Path("cache"), steps, 8192, 1)


def value(run: Run, flag: str) -> str | None:
    arguments = list(run.arguments)
    return arguments[arguments.index(flag) + 1] if flag in arguments else None


def test_flags() -> None:
    assert flags({"a": 1, "b": True, "c": False, "d": None, "e": 2e-3}) == [
        *("--a", "1", "--b", "--e", "0.002")
    ]


def test_the_model_is_llama_shaped() -> None:
    model = read_flags(MODEL)
    assert (model["normalization"], model["swiglu"]) == ("RMSNorm", True)
    assert model["position-embedding-type"] == "rope"
    assert model["num-query-groups"] < model["num-attention-heads"]
    assert model["untie-embeddings-and-output-weights"]
    assert model["disable-bias-linear"]


def test_runs_without_a_gpu() -> None:
    runs = plan(training(), Machine("cpu", "CPU", 2))
    assert [(run.label, run.ranks) for run in runs] == [
        *(("SP=2", 2), ("SP=1", 1), ("TP=2, same kernel", 2), ("TP=2, stock", 2))
    ]
    assert len({run.name for run in runs}) == len(runs)
    assert value(runs[0], "--sequence-parallel-size") == "2"
    assert [value(run, "--seqpar-kernel") for run in runs] == ["cpu", "cpu", "cpu", None]
    assert [value(run, "--tensor-model-parallel-size") for run in runs] == [None, None, "2", "2"]
    assert all("--bf16" not in run.arguments for run in runs)


def test_runs_on_gpus() -> None:
    runs = plan(training(), Machine("cuda", "GPU", 4))
    assert [run.label for run in runs] == ["SP=4", "SP=1"]  # 2 KV heads: no tensor parallelism of 4
    assert all("--bf16" in run.arguments for run in runs)
    assert all(value(run, "--distributed-backend") == "nccl" for run in runs)
    assert all(value(run, "--seqpar-kernel") == "aten" for run in runs)


def test_why_tensor_parallelism_is_left_out_is_said() -> None:
    assert left_out(MODEL, 2) is None
    assert left_out(MODEL, 1) is None
    assert "2 KV heads over 4 ranks" in str(left_out(MODEL, 4))


def test_one_rank_has_nothing_to_split() -> None:
    assert [run.label for run in plan(training(), Machine("cuda", "GPU", 1))] == ["SP=1"]


def test_all_runs_train_on_the_same() -> None:
    first, *others = (set(training().arguments()) for _ in range(2))
    runs = plan(training(), Machine("cpu", "CPU", 2))
    assert all(first <= set(run.arguments) for run in runs)
    assert others == [first]


@pytest.mark.parametrize("text", ["[1, 2]", "a: {b: 1}", "a: ["])
def test_a_model_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "m.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(SeqParError, match="--model"):
        read_flags(tmp_path / "m.yaml")


def test_a_missing_model_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SeqParError, match="No such file"):
        read_flags(tmp_path / "m.yaml")


def gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")


@pytest.mark.parametrize(
    ("device", "ranks", "have", "expected"),
    [
        ("auto", None, 0, ("cpu", 2)),
        ("auto", None, 8, ("cuda", 2)),
        ("auto", 4, 8, ("cuda", 4)),
        ("auto", None, 1, ("cpu", 2)),
        ("auto", 4, 2, ("cpu", 4)),
        ("cuda", None, 1, ("cuda", 1)),
        ("cpu", 2, 8, ("cpu", 2)),
    ],
)
def test_choice_of_device(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    ranks: int | None,
    have: int,
    expected: tuple[str, int],
) -> None:
    gpus(monkeypatch, have)
    here = machine.look(device, ranks)
    assert (here.device, here.ranks) == expected


def test_too_few_gpus_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 1)
    assert "1 GPU for 2 ranks" in machine.look("auto", None).notes[0]
    assert "not split" in machine.look("cuda", None).notes[0]
    with pytest.raises(SeqParError, match="this machine has 1 GPU"):
        machine.look("cuda", 2)


def test_bad_choices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 0)
    with pytest.raises(SeqParError, match="accepted values"):
        machine.look("tpu", None)
    with pytest.raises(SeqParError, match="at least 1"):
        machine.look("auto", 0)
    with pytest.raises(SeqParError, match="has 0 GPUs"):
        machine.look("cuda", None)


def test_a_lone_gpu_is_hidden_from_a_cpu_run() -> None:
    assert Machine("cpu", "CPU", 2).environment()["CUDA_VISIBLE_DEVICES"] == ""
