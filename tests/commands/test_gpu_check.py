# SPDX-License-Identifier: Apache-2.0
"""`scripts/gpu_check.py`, as far as it runs without a GPU; and that its checks can fail."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks.gpu import correctness, speed, timing
from benchmarks.gpu.settings import Scale
from benchmarks.gpu.truth import Shape, attention, inputs, seen
from megatron_seqpar.attention import ThreadTransport
from megatron_seqpar.attention.kernels.cpu import CpuFlashAttention
from megatron_seqpar.attention.kernels.reference import ReferenceAttention
from megatron_seqpar.attention.layouts import Span
from megatron_seqpar.attention.masks import Region, SlidingWindow

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def gpu_check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPTS / "gpu_check.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def check(gpu_check: ModuleType, output: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """(exit status, the parts of the result file) of a run on the CPU in this process."""
    status = gpu_check.main([str(output), "--device", "cpu", "--in-process", *arguments])
    result = json.loads((output / "gpu_check.json").read_text(encoding="utf-8"))
    assert {"command", "versions", "cpu", "kernels", "scale"} <= result.keys()
    return status, result["parts"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_says_that_there_is_no_gpu(
    gpu_check: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu_check.main([str(tmp_path)]) == 2
    assert "no CUDA device is present" in capsys.readouterr().err


def test_kernels_and_tiles(
    gpu_check: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, parts = check(gpu_check, tmp_path, "--only", "environment,kernels,tiles")
    assert status == 0
    assert list(parts) == ["environment", "correctness:cpu", "tiles", "speed:cpu"]
    assert {part["status"] for part in parts.values()} == {"ok"}
    right = parts["correctness:cpu"]["data"]
    assert 0.5 < right["worst_ratio"] <= 2
    assert len([name for name in right if name.startswith("band: ")]) == 14
    assert "no logit soft-cap" in right["soft-cap"]["refused"]
    rows = parts["speed:cpu"]["data"]["rows"]
    assert all(row["forward_tflops"] > 0 < row["backward_tflops"] for row in rows)
    tiles = parts["tiles"]["data"]["rows"]
    assert {row["schedule"] for row in tiles} >= {"balanced", "zigzag", "ring", "ulysses"}
    for row in tiles:
        assert all(row["rounds"][0]["split"][way]["tile"] > 0 for way in ("forward", "backward"))
    assert {path.name for path in tmp_path.iterdir()} == {
        "gpu_check.json", "speed.png", "tiles.png"
    }  # fmt: skip
    assert "error 1." in capsys.readouterr().out


def test_streams(gpu_check: ModuleType, tmp_path: Path) -> None:
    status, parts = check(gpu_check, tmp_path, "--only", "streams")
    assert status == 0, parts["streams"]["failures"]
    data = parts["streams"]["data"]
    assert data["worst"]["fp64"] < 1e-12
    assert sum(data["messages"]["wrong_numbers"]) == 0
    assert all(data["messages"]["runs_to_notice"].values())
    assert len(data["attention"]) > 40
    assert {row["runs"] for row in data["attention"].values()} == {1}


def test_an_executor_that_reads_too_early_is_found_out(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ThreadTransport, "settle", lambda self, end: None)
    status, parts = check(gpu_check, tmp_path, "--only", "streams")
    assert status == 1
    failures = parts["streams"]["failures"]
    assert any(line.startswith("messages: wrong numbers") for line in failures)
    assert any(", fp64, run 0: inf over 1e-08" in line for line in failures)


def test_a_wrong_kernel_is_found_out(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = CpuFlashAttention.backward

    def wrong(*arguments: object) -> tuple[torch.Tensor, ...]:
        dq, dk, dv = right(*arguments)  # type: ignore[arg-type]
        return dq, dk * 1.1, dv

    monkeypatch.setattr(CpuFlashAttention, "backward", wrong)
    status, parts = check(gpu_check, tmp_path, "--only", "correctness")
    assert status == 1
    assert len(parts["correctness:cpu"]["failures"]) > 20


def test_a_kernel_that_breaks_does_not_stop_the_rest(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access\nmore of it")

    monkeypatch.setattr(CpuFlashAttention, "forward", broken)
    status, parts = check(gpu_check, tmp_path, "--only", "environment,kernels")
    assert status == 1
    assert [part["status"] for part in parts.values()] == ["ok", "failed", "failed"]
    first = parts["correctness:cpu"]["failures"][0]
    assert first.endswith("RuntimeError: CUDA error: an illegal memory access")
    assert "broken" in parts["speed:cpu"]["data"]["traceback"]


def test_kernels_that_are_missing(gpu_check: ModuleType, tmp_path: Path) -> None:
    status, parts = check(gpu_check, tmp_path, "--only", "kernels", "--kernels", "flash3")
    assert status == 2
    assert [part["status"] for part in parts.values()] == ["left out", "left out"]
    assert "serves cuda tensors, not cpu" in parts["speed:flash3"]["left_out"][0]


def test_no_time(gpu_check: ModuleType, tmp_path: Path) -> None:
    status, parts = check(gpu_check, tmp_path, "--minutes", "0")
    assert status == 2
    assert {part["status"] for part in parts.values()} == {"left out"}
    assert list(parts) == [
        "environment", "correctness:cpu", "streams", "tiles", "speed:cpu", "processes", "tests",
        "training",
    ]  # fmt: skip


def test_unknown_parts_are_named(
    gpu_check: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        gpu_check.main([str(tmp_path), "--only", "kernls"])
    assert "--only kernls: the parts are environment, correctness" in capsys.readouterr().err


def test_tests_that_need_a_gpu(gpu_check: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "test_sample.py"
    file.write_text(
        "import pytest\n\n"
        "@pytest.mark.needs_gpu\ndef test_sum() -> None:\n    assert 1 + 1 == 3\n\n"
        "def test_other() -> None:\n    assert False\n",
        encoding="utf-8",
    )
    status, parts = check(gpu_check, tmp_path, "--only", "tests", "--tests", str(file))
    assert status == 1
    assert parts["tests"]["data"]["counts"] == {"failed": 1}
    assert "::test_sum" in parts["tests"]["failures"][0]


def test_each_part_in_a_process_of_its_own(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One part ends well; one is ended from outside; the other's result stays."""
    sleepy = tmp_path / "test_sleepy.py"
    sleepy.write_text(
        "import os, pytest, time\n\n@pytest.mark.needs_gpu\ndef test_sleep() -> None:\n"
        "    os.killpg(0, 9)\n",
        encoding="utf-8",
    )
    output = tmp_path / "output"
    arguments = [str(output), "--device", "cpu", "--only", "environment,tests"]
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *arguments])
    assert gpu_check.main([*arguments, "--tests", str(sleepy)]) == 1
    parts = json.loads((output / "gpu_check.json").read_text(encoding="utf-8"))["parts"]
    assert parts["environment"]["status"] == "ok"
    assert parts["tests"]["failures"] == ["status: -9"]
    assert "==> tests" in (output / "log.txt").read_text(encoding="utf-8")


@pytest.mark.slow
def test_processes_and_training(gpu_check: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("megatron.training")
    status, parts = check(gpu_check, tmp_path, "--only", "processes,training")
    assert status == 0, [part["failures"] for part in parts.values()]
    assert parts["processes"]["data"]["gloo"]["ran"]["fp64"] < 1e-12
    differences = parts["training"]["data"]["largest_relative_difference"]
    plugin = ("axis off", "cpu attention", "all that saves memory")
    assert set(differences) == {*(f"plugin, {way}" for way in plugin), "SP=2, gloo"}
    assert max(differences.values()) < 1e-5


# ---- what it computes with ------------------------------------------------------------------


def test_the_truth_against_the_reference_kernel() -> None:
    for case in correctness.cases(Scale.TINY):
        shape, call = case.trimmed()
        data = inputs(shape, torch.float64, CPU)
        q, kv = (Span(0, size) for size in shape.tokens)
        pairs = seen((Region(q, kv, call.low, call.high),), shape.tokens, CPU)
        assert pairs.any(0).all()
        assert pairs.any(1).all()
        truth = attention(data, pairs, torch.float64, call.scale, call.softcap)
        got = correctness.both_passes(ReferenceAttention(), data, call)
        for ours, exact in zip(got, truth, strict=True):
            assert (ours - exact).abs().max() < 1e-12, case.name


def test_pairs_of_a_mask_of_several_regions() -> None:
    pairs = seen(SlidingWindow(1, 0, 1).regions(4), (4, 4), CPU)
    assert pairs.int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 1, 1]]


def test_sliced_inputs_are_the_same_numbers() -> None:
    data = inputs(Shape((5, 5), 2, 2, 4, 4), torch.float32, CPU)
    for whole, part in zip(data, correctness.sliced(data), strict=True):
        assert torch.equal(whole, part)
        assert not part.is_contiguous()
        assert part.stride(-1) == 1


def test_floating_point_operations() -> None:
    assert speed.Case("causal", 4, 3, 3, 8).forward_flops == 4 * 3 * 10 * 8
    assert speed.Case("full", 4, 3, 1, 8).backward_flops == 10 * 3 * 16 * 8
    assert speed.Case("window 1", 4, 1, 1, 8).pairs == 7


def test_clocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert timing.clocks() is None
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!{sys.executable}\nprint('1980 MHz, 3201 MHz, 1980 MHz, 41, 120.5 W')\n")
    smi.chmod(0o755)
    found = timing.clocks()
    assert found is not None
    assert (found["clocks.sm"], found["power.draw"]) == ("1980 MHz", "120.5 W")


def test_times_are_medians_of_the_calls_asked_for() -> None:
    calls: list[int] = []
    found = timing.time_calls(lambda: calls.append(1), CPU, seconds=1.0, warm_up=2, most=7)
    assert (found.calls, len(calls)) == (7, 2 + 1 + 7)
    assert found.least <= found.median <= found.most


def test_every_kernel_against_the_best() -> None:
    tile = {"kind": "full", "tokens": 64, "heads": 2, "kv_heads": 2, "dim": 16}
    rows = {
        "a": [{**tile, "forward_tflops": 300.0, "backward_tflops": 200.0}],
        "b": [{**tile, "forward_tflops": 400.0, "backward_tflops": 100.0}],
    }
    forward, backward = speed.against_best(rows)
    assert (forward["best"], backward["best"]) == ("b", "a")
    assert forward["tflops"] == {"a": 300.0, "b": 400.0}


# ---- the shell script -----------------------------------------------------------------------


def shell(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPTS / "gpu_check.sh"), *arguments],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=120,
    )


def test_script_with_an_installed_python(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    output = tmp_path / "output"
    options = ("--installed", str(output), "--device", "cpu", "--only", "environment")
    done = shell(*options, SEQPAR_PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    assert "GPU check with" in done.stdout
    assert (output / "gpu_check.json").is_file()


def test_script_says_what_is_missing(tmp_path: Path) -> None:
    assert "name the folder for the results" in shell().stderr
    assert "--wheels /nowhere: no such folder" in shell("--wheels", "/nowhere", "x").stderr
    lacking = shell("--installed", str(tmp_path), SEQPAR_PYTHON=str(tmp_path / "python"))
    assert lacking.returncode == 1
    assert "no Python 3.11 or later with torch was found" in lacking.stderr
    assert "bash scripts/gpu_check.sh OUTPUT" in shell("--help").stdout
