# SPDX-License-Identifier: Apache-2.0
"""The diffs in patches/: added lines only, and the same run as through the launcher."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_seqpar import compatibility
from tests.integration.runs import ROOT, launch, trained
from tests.support.releases import CHECKOUT, checkout_version, needs_checkout

PATCHES = sorted((ROOT / "patches").glob("*.diff"))
CHECK = [sys.executable, str(ROOT / "scripts" / "check_patches.py")]
LINES = "+    from megatron_seqpar.integration import install\n+\n+    install()\n"


def check(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*CHECK, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("patch", PATCHES, ids=lambda path: path.stem)
def test_a_patch_only_adds_the_three_lines_and_has_no_context(patch: Path) -> None:
    text = patch.read_text()
    for line in text.splitlines():
        assert line.startswith(("--- a/", "+++ b/", "@@ -", "+")), line
        if line.startswith("@@"):
            assert line.split()[1].endswith(",0"), f"{line}: takes lines away"
    assert text.count(LINES) == text.count("@@ -") == text.count("+++ b/") >= 2


def test_there_is_a_patch_for_every_release() -> None:
    assert [patch.stem for patch in PATCHES] == [one.tag for one in compatibility.RELEASES]
    listed = (ROOT / "patches" / "README.md").read_text()
    for patch in PATCHES:
        assert f"`{patch.name}`" in listed


def fork(folder: Path, version: str, before_main: int) -> Path:
    """A checkout made here: scripts of so many lines before their main block, of this version."""
    (folder / "megatron" / "core").mkdir(parents=True)
    numbers = dict(zip(("MAJOR", "MINOR", "PATCH"), version.split("."), strict=True))
    text = "".join(f"{name} = {number}\n" for name, number in numbers.items())
    (folder / "megatron" / "core" / "package_info.py").write_text(text)
    for name in ("pretrain_gpt.py", "pretrain_mamba.py", "pretrain_hybrid.py"):
        lines = ["pass"] * before_main + ['if __name__ == "__main__":', "    print(1)", ""]
        (folder / name).write_text("\n".join(lines + ["pass"] * 800))
    return folder


def test_a_script_that_moved_is_told_where_the_lines_belong(tmp_path: Path) -> None:
    done = check(str(fork(tmp_path, "0.18.2", before_main=500)))
    assert done.returncode == 1, done.stderr
    assert "FAILED core_v0.18.2.diff: pretrain_gpt.py:382 is not its `if __name__" in done.stdout
    assert "put its lines below pretrain_gpt.py:501 and pretrain_hybrid.py:501" in done.stdout


def test_an_unknown_release_is_checked_with_the_nearest_patch(tmp_path: Path) -> None:
    done = check(str(fork(tmp_path, "0.21.0", before_main=9)))
    assert "megatron-core 0.21.0, which is not known; nearest core_v0.19.0" in done.stdout
    assert done.returncode == 1


def test_what_is_no_checkout_is_an_error(tmp_path: Path) -> None:
    for arguments in ((str(tmp_path),), ()):
        assert check(*arguments).returncode == 2


def test_the_installed_release_has_all_patch_points() -> None:
    pytest.importorskip("megatron.core")
    done = check("--installed")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ok     install() replaces and restores the" in done.stdout


@needs_checkout
def test_the_patch_of_a_checkout_applies_and_is_taken_back(tmp_path: Path) -> None:
    found = check(str(CHECKOUT))
    assert found.returncode == 0, found.stdout + found.stderr
    patch, copy = patched_copy(tmp_path)
    assert patch.name in found.stdout
    assert check(str(copy)).stdout.endswith(f"ok     {patch.name} is applied\n")
    subprocess.run(["git", "apply", "--unidiff-zero", "--reverse", patch], cwd=copy, check=True)
    for script in ("pretrain_gpt.py", "pretrain_mamba.py"):
        assert (copy / script).read_bytes() == (CHECKOUT / script).read_bytes()


def patched_copy(folder: Path) -> tuple[Path, Path]:
    """(the patch of the checkout's release, a copy of its scripts where it is applied)."""
    for script in CHECKOUT.glob("*.py"):
        shutil.copy(script, folder)
    (folder / "megatron").symlink_to(CHECKOUT / "megatron")
    patch = ROOT / "patches" / f"{compatibility.nearest(checkout_version()).tag}.diff"
    subprocess.run(["git", "apply", "--unidiff-zero", str(patch)], cwd=folder, check=True)
    return patch, folder


@needs_checkout
def test_a_patched_script_runs_like_the_launcher(tmp_path: Path) -> None:
    """The script calls install() itself: the launcher only brings the CPU runtime."""
    _, copy = patched_copy(tmp_path)
    arguments = ("--sequence-parallel-size", "2")
    patched = trained(launch(2, *arguments, script=copy / "pretrain_gpt.py", plugin=False))
    ours = trained(launch(2, *arguments, script=CHECKOUT / "pretrain_gpt.py"))
    alone = trained(launch(1, script=CHECKOUT / "pretrain_gpt.py", plugin=False))
    assert patched.losses == ours.losses
    assert patched.losses == pytest.approx(alone.losses, rel=1e-6)
