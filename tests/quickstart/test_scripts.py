# SPDX-License-Identifier: Apache-2.0
"""The set-up functions of scripts/common.sh, each in a shell of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
TOOLS = ("bash", "dirname", "cat", "cksum", "cut", "id", "env", "mkdir", "mv", "sed")


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A folder for PATH with the few tools that the scripts need, and no Python."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name in TOOLS:
        found = shutil.which(name)
        assert found is not None
        (folder / name).symlink_to(found)
    return folder


def shell(command: str, path: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", f"source {SCRIPTS}/common.sh; {command}"],
        env={"PATH": path, "HOME": "/nonexistent", **variables},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


def fake_python(path: Path, version: str) -> None:
    """Something called python that passes for one of `version`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    passes = "exit 0" if version == "3.12" else "exit 1"
    path.write_text(f"#!/bin/bash\n{passes}\n", encoding="utf-8")
    path.chmod(0o755)


def test_python_on_the_path(tools: Path) -> None:
    fake_python(tools / "python3", "3.12")
    assert shell("seqpar_find_python", str(tools)).stdout.strip() == str(tools / "python3")


def test_a_shim_that_does_not_run_is_passed_over(tools: Path, tmp_path: Path) -> None:
    fake_python(tools / "python3.12", "broken")
    fake_python(tools / "python3", "3.11")
    installed = tmp_path / "pyenv" / "versions" / "3.12.1" / "bin" / "python3"
    fake_python(installed, "3.12")
    done = shell("seqpar_find_python", str(tools), PYENV_ROOT=str(tmp_path / "pyenv"))
    assert done.stdout.strip() == str(installed)


@pytest.mark.skipif(
    any(Path(p).exists() for p in ("/opt/homebrew/bin/python3.12", "/usr/local/bin/python3.12")),
    reason="this machine has Python 3.12 where the scripts always look",
)
def test_no_python_says_what_to_install(tools: Path) -> None:
    done = shell("seqpar_find_python; echo went on", str(tools))
    assert done.returncode == 1
    assert "apt-get install python3.12" in done.stderr
    assert "went on" not in done.stdout


def test_a_named_python_must_fit(tools: Path) -> None:
    fake_python(tools / "old", "3.11")
    done = shell("seqpar_find_python", str(tools), SEQPAR_PYTHON=str(tools / "old"))
    assert done.returncode == 1
    assert "is not a working Python 3.12" in done.stderr


@pytest.mark.parametrize(("choice", "expected"), [("0", "0"), ("1", "1"), ("auto", "0")])
def test_system_packages(choice: str, expected: str) -> None:
    command = f"seqpar_system_site {sys.executable}"
    done = shell(command, os.environ["PATH"], SEQPAR_SYSTEM_SITE=choice)
    assert done.stdout.strip() == expected


def test_an_image_with_torch_keeps_it() -> None:
    command = f"seqpar_system_site {sys.executable}"
    done = shell(command, os.environ["PATH"], NVIDIA_PYTORCH_VERSION="26.01")
    assert done.stdout.strip() == "1"
    done = shell(f"seqpar_constraints {sys.executable} 1", os.environ["PATH"])
    import importlib.metadata

    assert f"torch=={importlib.metadata.version('torch')}" in done.stdout.splitlines()


def test_bad_choice_of_system_packages() -> None:
    done = shell("seqpar_system_site python", os.environ["PATH"], SEQPAR_SYSTEM_SITE="maybe")
    assert done.returncode == 1
    assert "accepted values are 0, 1 and auto" in done.stderr


def test_constraints_are_exact() -> None:
    done = shell(f"seqpar_constraints {sys.executable} 0", os.environ["PATH"])
    pins = dict(line.split("==") for line in done.stdout.splitlines())
    assert pins["torch"] == "2.11.0"
    assert pins["megatron-core"] == "0.19.2"
    assert {"typer", "rich", "numpy", "einops", "psutil", "PyYAML", "pytest", "ruff"} <= set(pins)


def test_other_versions_than_the_tested_ones() -> None:
    """Which an image's own packages win over."""
    pins = {"SEQPAR_PINS": "megatron_core==0.18.2 torch==1.0 new==3"}
    done = shell(f"seqpar_constraints {sys.executable} 0", os.environ["PATH"], **pins)
    lines = done.stdout.splitlines()
    assert {"megatron-core==0.18.2", "torch==1.0", "new==3"} <= set(lines)
    done = shell(f"seqpar_constraints {sys.executable} 1", os.environ["PATH"], **pins)
    assert "torch==1.0" not in done.stdout.splitlines()
    done = shell(f"seqpar_constraints {sys.executable} 0", os.environ["PATH"], SEQPAR_PINS="torch")
    assert done.returncode == 1
    assert "SEQPAR_PINS: torch: write NAME==VERSION" in done.stderr
    stamps = [
        shell(f"seqpar_stamp {sys.executable} 0", os.environ["PATH"], **each).stdout
        for each in ({}, {}, pins)
    ]
    assert stamps[0] == stamps[1] != stamps[2]


def test_an_up_to_date_environment_is_left_alone(tmp_path: Path) -> None:
    """With a stamp in place nothing is installed: the fake interpreter could not."""
    venv = tmp_path / "venv"
    fake_python(venv / "bin" / "python", "3.12")
    command = (
        f'seqpar_stamp {sys.executable} 0 > "{venv}/.seqpar-installed-dev"; '
        "before=$(ls -A $SEQPAR_VENV); seqpar_setup dev; "
        '[[ "$before" == "$(ls -A $SEQPAR_VENV)" ]] && echo same'
    )
    done = shell(command, os.environ["PATH"], SEQPAR_VENV=str(venv), SEQPAR_PYTHON=sys.executable)
    assert "is up to date" in done.stdout
    assert done.stdout.strip().endswith("same")


@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh", "common.sh"])
def test_scripts_parse(script: str) -> None:
    subprocess.run(["bash", "-n", str(SCRIPTS / script)], check=True)
