# SPDX-License-Identifier: Apache-2.0
"""What an experiment runs on, and what it tells Megatron about it."""

import pytest

from megatron_seqpar.errors import SeqParError
from megatron_seqpar.experiments import machine
from megatron_seqpar.experiments.machine import Machine


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
