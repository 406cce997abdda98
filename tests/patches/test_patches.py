# SPDX-License-Identifier: Apache-2.0
"""The diffs in patches/: added lines only, and the same run as through the launcher."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.integration.runs import ROOT, launch, trained

PATCHES = sorted((ROOT / "patches").glob("*.diff"))
CHECKOUT = os.environ.get("MEGATRON_LM_PATH")


@pytest.mark.parametrize("patch", PATCHES, ids=lambda path: path.stem)
def test_a_patch_only_adds_lines_and_has_no_context(patch: Path) -> None:
    lines = patch.read_text().splitlines()
    assert any(line.startswith("+") and not line.startswith("+++") for line in lines)
    for line in lines:
        assert line.startswith(("--- a/", "+++ b/", "@@ -", "+")), line
        if line.startswith("@@"):
            assert line.split()[1].endswith(",0"), f"{line}: takes lines away"


def test_there_is_a_patch_for_the_supported_release() -> None:
    assert [patch.stem for patch in PATCHES] == ["core_v0.19.0"]


@pytest.mark.skipif(CHECKOUT is None, reason="MEGATRON_LM_PATH names no Megatron-LM checkout")
def test_a_patched_script_runs_like_the_launcher(tmp_path: Path) -> None:
    """The script calls install() itself: the launcher only brings the CPU runtime."""
    for script in Path(str(CHECKOUT)).glob("*.py"):
        shutil.copy(script, tmp_path)
    apply = ["git", "apply", "--unidiff-zero", str(PATCHES[-1])]
    subprocess.run(apply, cwd=tmp_path, check=True)
    arguments = ("--sequence-parallel-size", "2")
    patched = trained(launch(2, *arguments, script=tmp_path / "pretrain_gpt.py", plugin=False))
    ours = trained(launch(2, *arguments, script=Path(str(CHECKOUT)) / "pretrain_gpt.py"))
    assert patched.losses == ours.losses
    subprocess.run([*apply, "--reverse"], cwd=tmp_path, check=True)
    original = (Path(str(CHECKOUT)) / "pretrain_gpt.py").read_text()
    assert (tmp_path / "pretrain_gpt.py").read_text() == original
