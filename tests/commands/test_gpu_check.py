# SPDX-License-Identifier: Apache-2.0
"""`scripts/gpu_check.py`, as far as it runs without a GPU."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from megatron_seqpar.attention.kernels.cpu import CpuFlashAttention

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "gpu_check.py"
SMALL = (
    "--device", "cpu", "--tokens", "128", "--check-tokens", "96", "--heads", "4", "--kv-heads", "2",
    "--head-dim", "32", "--ranks", "2,3",
)  # fmt: skip


@pytest.fixture(scope="module")
def gpu_check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_says_that_there_is_no_gpu(
    gpu_check: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu_check.main([]) == 2
    assert "no CUDA device is present" in capsys.readouterr().err


def test_on_cpu(gpu_check: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "report.json"
    assert gpu_check.main([*SMALL, "--json", str(report)]) == 0
    printed = capsys.readouterr().out
    assert "cpu        ok" in printed
    assert "3 ranks: error ratio" in printed
    (entry,) = json.loads(report.read_text())
    assert entry["worst_ratio"] <= 2
    assert entry["ranks"]["2"]["bytes_as_planned"] is True
    assert entry["forward_tflops"] > 0


def test_a_wrong_kernel_is_found_out(
    gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = CpuFlashAttention.backward

    def wrong(*arguments: object) -> tuple[torch.Tensor, ...]:
        dq, dk, dv = right(*arguments)  # type: ignore[arg-type]
        return dq, dk * 1.1, dv

    monkeypatch.setattr(CpuFlashAttention, "backward", wrong)
    assert gpu_check.main([*SMALL]) == 1
    assert "cpu        WRONG" in capsys.readouterr().out


def test_a_kernel_that_breaks_is_reported(
    gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access\nmore of it")

    monkeypatch.setattr(CpuFlashAttention, "forward", broken)
    assert gpu_check.main([*SMALL]) == 1
    assert "cpu        FAILED CUDA error: an illegal memory access\n" in capsys.readouterr().out


def test_kernels_that_are_missing(
    gpu_check: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu_check.main([*SMALL, "--kernels", "flash3"]) == 2
    streams = capsys.readouterr()
    assert "flash3     -      kernel='flash3': serves cuda tensors, not cpu" in streams.out
    assert "no kernel could be checked" in streams.err
