# SPDX-License-Identifier: Apache-2.0
"""The command on a healthy installation and on broken ones, each broken by real means."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_seqpar.doctor.machine import Machine

pytest.importorskip("megatron.core")

MISSING_EXTRA = next(
    (name for name, module in (("te", "transformer_engine"), ("flash", "flash_attn"))
     if importlib.util.find_spec(module) is None),
    None,
)  # fmt: skip


def doctor(*arguments: str, path: Path | None = None, **environ: str) -> tuple[int, str]:
    """Exit status and output of the command, without a GPU; `path` comes first on PYTHONPATH."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **environ}
    if path is not None:
        before = os.environ.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join([str(path), *([before] if before else [])])
    done = subprocess.run(
        [sys.executable, "-m", "megatron_seqpar", "doctor", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    return done.returncode, done.stdout


def findings(output: str) -> dict[str, dict[str, Any]]:
    return {finding["name"]: finding for finding in json.loads(output)["findings"]}


def test_a_healthy_installation() -> None:
    status, output = doctor("--world", "4", "--sp", "2", "--json")
    found = findings(output)
    wrong = {name: one for name, one in found.items() if one["status"] == "problem"}
    assert wrong == {}
    assert (status, json.loads(output)["healthy"]) == (0, True)
    assert list(found) == [
        *("python", "packages", "torch", "megatron-core", "extras", "kernels", "gpus"),
        *("communication", "layout", "limits", "folders", "self-test"),
    ]
    assert found["layout"]["data"]["SP"] == [[0, 1], [2, 3]]
    assert found["layout"]["data"]["DP"] == [[0, 2], [1, 3]]
    assert found["kernels"]["data"]["chosen"] == {"cpu float32": "cpu"}
    assert any(line.startswith("flash2: ") for line in found["kernels"]["details"])
    test = found["self-test"]
    assert test["text"].startswith("2 processes over gloo: 4 comparisons with fp64 are right")
    cases = {case["name"]: case["value"] for case in test["data"]["cases"]}
    assert cases.keys() == {
        *("balanced in float64", "zigzag in float64", "ring in float64", "auto in float32")
    }
    assert 0 < cases["balanced in float64"] < 1e-12
    assert 0 < cases["auto in float32"] < 2


def test_five_things_broken_at_once_have_a_fix_each(tmp_path: Path) -> None:
    metadata = tmp_path / "torch-2.4.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.4.0\n")
    file = tmp_path / "file"
    file.write_text("")
    assert MISSING_EXTRA is not None
    status, output = doctor(
        *("--world", "6", "--tp", "4", "--device", "cuda", "--extra", MISSING_EXTRA, "--json"),
        path=tmp_path,
        TORCHINDUCTOR_CACHE_DIR=str(file),
    )
    assert status == 1
    found = findings(output)
    problems = {name: one for name, one in found.items() if one["status"] == "problem"}
    assert problems.keys() == {"torch", "extras", "communication", "layout", "folders"}
    fixes = {name: one["fix"] for name, one in problems.items()}
    assert fixes["torch"] == "python -m pip install 'torch==2.11.0'"
    assert "torch 2.4.0 is installed, and >=2.6 is needed" in problems["torch"]["text"]
    assert fixes["extras"] == f"python -m pip install 'megatron_seqpar[{MISSING_EXTRA}]'"
    hidden = Machine().has_nvidia_device  # where a GPU is, this test has hidden it
    wanted = "unset CUDA_VISIBLE_DEVICES" if hidden else "megatron-seqpar run --device cpu"
    assert fixes["communication"].startswith(wanted)
    assert fixes["layout"].startswith("start 4 or 8 processes: megatron-seqpar run --nproc 4 ")
    assert fixes["folders"].startswith("export TORCHINDUCTOR_CACHE_DIR=")
    assert f"{file} is a file" in problems["folders"]["text"]
    assert found["self-test"]["status"] == "absent"
    if found["megatron-core"]["status"] != "ok":  # its import makes that cache
        assert found["megatron-core"]["fix"] == "mend the folders first"


def test_without_torch_and_megatron_it_says_so(tmp_path: Path) -> None:
    """Packages that fail on import as missing ones do, before those that are there."""
    for name in ("torch", "megatron"):
        package = tmp_path / name / "__init__.py"
        package.parent.mkdir()
        package.write_text(
            f"raise ModuleNotFoundError(\"No module named '{name}'\", name='{name}')\n"
        )
    status, output = doctor(path=tmp_path)
    assert status == 1
    lines = [line.split() for line in output.splitlines()]
    assert ["problem", "torch", "torch", "is", "not", "installed"] in lines
    assert ["fix", "python", "-m", "pip", "install", "'torch==2.11.0'"] in lines
    assert any(line[:2] == ["absent", "megatron-core"] for line in lines)
    assert any(line[:2] == ["absent", "self-test"] for line in lines)
    assert lines[-1] == ["1", "problem"]


@pytest.mark.slow
def test_wrong_numbers_are_found(tmp_path: Path) -> None:
    """A kernel that is wrong in the fourth digit, as a miscompiled one would be."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "if 'megatron_seqpar.doctor.self_test' in sys.orig_argv:\n"
        "    from megatron_seqpar.attention.kernels import cpu\n"
        "    right = cpu.CpuFlashAttention.forward\n"
        "    def forward(self, *args):\n"
        "        out, lse = right(self, *args)\n"
        "        return out * 1.0001, lse\n"
        "    cpu.CpuFlashAttention.forward = forward\n"
    )
    status, output = doctor("--json", path=tmp_path)
    assert status == 1
    test = findings(output)["self-test"]
    assert test["status"] == "problem"
    assert "wrong numbers in balanced in float64" in test["text"]
    assert test["fix"] == "python -m pip install --force-reinstall 'torch==2.11.0'"
