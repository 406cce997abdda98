# SPDX-License-Identifier: Apache-2.0
"""What an installed package has of the benchmarks: the script and the models that they train."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_seqpar.errors import SeqParError
from megatron_seqpar.shipped import model_file, model_names, pretraining_script

REPOSITORY = Path(__file__).resolve().parents[2]


def test_a_built_package_brings_script_and_models(tmp_path: Path) -> None:
    build = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(build, cwd=REPOSITORY, check=True, capture_output=True, timeout=120)
    check = (
        "from megatron_seqpar.shipped import *\n"
        "print(pretraining_script(), model_file('llama3-8b'), *model_names(), sep='\\n')"
    )
    done = subprocess.run(
        [sys.executable, "-c", check], cwd=tmp_path, check=True, capture_output=True, text=True,
        env={"PYTHONPATH": str(tmp_path)}, timeout=60,
    )  # fmt: skip
    script, model, *names = done.stdout.splitlines()
    assert tuple(names) == model_names()
    for found, own in ((script, pretraining_script()), (model, model_file("llama3-8b"))):
        assert Path(found).is_relative_to(tmp_path)
        assert Path(found).read_bytes() == own.read_bytes()
    # launched by its path
    assert (tmp_path / "megatron_seqpar" / "bench" / "memory_rank.py").is_file()


def test_models_by_name_and_by_path(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("num-layers: 1\n")
    assert model_file(own) == own
    with pytest.raises(SeqParError, match=r"--model llama9: no such file.*llama3-8b"):
        model_file("llama9")
