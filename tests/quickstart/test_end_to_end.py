# SPDX-License-Identifier: Apache-2.0
"""The whole quickstart on a short sequence, twice: the second time it trains nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

OPTIONS = ("--device", "cpu", "--nproc", "2", "--seq-length", "256", "--steps", "3")


def quickstart(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_seqpar.quickstart", *OPTIONS, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280
    )


@pytest.mark.slow
def test_quickstart(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"document {i}: " + "some words " * 100}) for i in range(20)]
    (tmp_path / "my.jsonl").write_text("\n".join(lines), encoding="utf-8")
    first = quickstart(tmp_path, "--input", "my.jsonl")
    assert first.returncode == 0, first.stdout + first.stderr
    assert "20 documents" in first.stdout
    assert first.stdout.count("step 3/3") == 4
    for word in ("SP=2", "SP=1", "TP=2 + TP-SP, stock", "reference", "losses.png"):
        assert word in first.stdout
    output = tmp_path / "runs" / "quickstart"
    result = json.loads((output / "quickstart.json").read_text(encoding="utf-8"))
    losses = {row["label"]: row["losses"] for row in result["by_length"]["256"]}
    assert len(losses) == 4
    for name in losses:
        assert losses[name] == pytest.approx(losses["SP=1"], rel=1e-5)
    assert (output / "losses.png").stat().st_size > 10_000

    again = quickstart(tmp_path, "--input", "my.jsonl")
    assert again.returncode == 0
    assert again.stdout.count("ok, stored before") == 4
    assert "step 3/3" not in again.stdout


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    done = quickstart(tmp_path, "--input", "none.jsonl")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == "error: --input none.jsonl: no such file"
    assert "Traceback" not in done.stderr
