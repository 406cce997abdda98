# SPDX-License-Identifier: Apache-2.0
"""The Dockerfile, as far as that goes without a Docker daemon: what it names exists."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_seqpar.cli import app

REPOSITORY = Path(__file__).resolve().parents[2]
IGNORED = (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").splitlines()


def instructions() -> dict[str, list[tuple[str, str]]]:
    """Target -> (instruction, its arguments) in order; "" for what stands before the first."""
    text = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    found: dict[str, list[tuple[str, str]]] = {"": []}
    target = ""
    for line in re.sub(r"\\\n", " ", "\n".join(lines)).splitlines():
        name, _, rest = line.strip().partition(" ")
        if name == "FROM":
            target = rest.split(" AS ")[1]
            found[target] = []
        if name:
            found[target].append((name, rest.strip()))
    return found


TARGETS = {name: steps for name, steps in instructions().items() if name}


def test_the_target_that_is_built_by_default_is_for_gpus() -> None:
    assert list(TARGETS) == ["cpu", "gpu"]
    arguments = dict(rest.split("=", 1) for name, rest in instructions()[""] if name == "ARG")
    assert re.fullmatch(r"nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3", arguments["IMAGE"])
    assert arguments["CPU_IMAGE"] == "python:3.12-slim"
    assert TARGETS["gpu"][0] == ("FROM", "${IMAGE} AS gpu")


@pytest.mark.parametrize("target", TARGETS)
def test_the_user_is_not_root(target: str) -> None:
    users = [rest for name, rest in TARGETS[target] if name == "USER"]
    assert users == ["${UID}"]
    assert ("ARG", "UID=1001") in TARGETS[target]
    before = [name for name, _ in TARGETS[target][: TARGETS[target].index(("USER", "${UID}"))]]
    assert "COPY" not in before, "all that is copied belongs to the user"


@pytest.mark.parametrize("target", TARGETS)
def test_the_health_check_is_a_command_of_ours(target: str) -> None:
    [check] = [rest for name, rest in TARGETS[target] if name == "HEALTHCHECK"]
    command = json.loads(check[check.index("[") :])
    assert command[:2] == ["megatron-seqpar", "doctor"]
    told = CliRunner().invoke(app, ["doctor", "--help"], env={"COLUMNS": "200"}).output
    for word in command[2:]:
        assert not word.startswith("--") or word in told


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_copied_exists_and_is_not_left_out(target: str) -> None:
    copies = [rest for name, rest in TARGETS[target] if name == "COPY"]
    assert copies[-1].split() == ["--chown=seqpar:seqpar", ".", "."]
    for copied in copies[:-1]:
        *sources, _ = [word for word in shlex.split(copied) if not word.startswith("--")]
        for source in sources:
            assert (REPOSITORY / source).exists(), source
            assert source not in IGNORED


@pytest.mark.parametrize("target", TARGETS)
def test_the_images_packages_are_used_on_gpus_alone(target: str) -> None:
    [settings] = [rest for name, rest in TARGETS[target] if name == "ENV"]
    assert f"SEQPAR_SYSTEM_SITE={int(target == 'gpu')}" in settings
    assert 'SEQPAR_PINS="${PINS}"' in settings
    installs = [rest for name, rest in TARGETS[target] if name == "RUN" and "seqpar_setup" in rest]
    assert len(installs) == 1
    assert not any("pip install" in rest for name, rest in TARGETS[target] if name == "RUN")


def test_what_a_checkout_has_stays_outside() -> None:
    assert {".git", ".venv*", "runs", "dist", "**/__pycache__"} <= set(IGNORED)
