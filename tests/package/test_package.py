# SPDX-License-Identifier: Apache-2.0
"""The wheel and the source distribution: what they hold, say of themselves, and do when installed.

Built from a copy of the tree. The wheel is used from an empty folder with this environment's
packages; `scripts/package.sh --install` does the same with an environment of its own.
"""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from email.message import Message
from pathlib import Path

import pytest

import megatron_seqpar
from megatron_seqpar.shipped import model_names, run_names

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCES = (
    "megatron_seqpar", "configs", "scripts", "requirements", "patches", "setup.py", "MANIFEST.in",
    "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "Dockerfile", ".dockerignore",
)  # fmt: skip
BUILD = """
from setuptools import build_meta
print(build_meta.build_sdist("dist"))
print(build_meta.build_wheel("dist"))
"""


@dataclass(frozen=True)
class Built:
    """What was built, and the wheel unpacked as pip would."""

    wheel: Path
    source: Path
    site: Path
    metadata: Message


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    tree = tmp_path_factory.mktemp("tree")
    for name in SOURCES:
        path = REPOSITORY / name
        if path.is_dir():
            shutil.copytree(path, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, tree / name)
    done = subprocess.run(
        [sys.executable, "-c", BUILD], cwd=tree, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    wheel, source = (next((tree / "dist").glob(ending)) for ending in ("*.whl", "*.tar.gz"))
    site = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    [info] = site.glob("*.dist-info")
    return Built(wheel, source, site, email.message_from_string((info / "METADATA").read_text()))


def test_both_are_named_by_the_version(built: Built) -> None:
    version = megatron_seqpar.__version__
    assert built.wheel.name == f"megatron_seqpar-{version}-py3-none-any.whl"
    assert built.source.name == f"megatron_seqpar-{version}.tar.gz"
    assert built.metadata["Version"] == version


def test_metadata(built: Built) -> None:
    data = built.metadata
    assert data["Requires-Python"] == ">=3.11"
    assert "Apache-2.0" in (data["License"] or data["License-Expression"])
    assert data.get_all("License-File") == ["LICENSE"]
    assert "Typing :: Typed" in data.get_all("Classifier", [])
    assert data["Description-Content-Type"] == "text/markdown"
    assert data.get_payload().lstrip().startswith("# megatron_seqpar")
    extras = {"te", "flash", "gpu", "hf", "plot", "docs", "dev", "package", "all"}
    assert set(data.get_all("Provides-Extra", [])) == extras
    needed = [
        line.split(";")[0] for line in data.get_all("Requires-Dist", []) if "extra" not in line
    ]
    assert {"torch>=2.6", "numpy", "typer", "rich", "PyYAML", "pydantic>=2"} <= set(needed)


def test_the_wheel_holds_types_files_and_license_and_no_tests(built: Built) -> None:
    names = {str(path.relative_to(built.site)) for path in built.site.rglob("*") if path.is_file()}
    assert "megatron_seqpar/py.typed" in names
    assert {f"megatron_seqpar/configs/models/{name}.yaml" for name in model_names()} <= names
    assert {f"megatron_seqpar/configs/runs/{name}.yaml" for name in run_names()} <= names
    assert "megatron_seqpar/scripts/pretrain_gpt.py" in names
    assert [name for name in names if name.endswith("licenses/LICENSE")]
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "scripts"))]
    code = {
        str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "megatron_seqpar").rglob("*.py")
    }
    assert code <= names, "a folder without __init__.py is left out"


def test_the_source_distribution_can_build_and_set_up(built: Built) -> None:
    with tarfile.open(built.source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "setup.py", "pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md", "Dockerfile",
        "requirements/constraints.txt", "scripts/common.sh", "scripts/slurm_pretrain.sbatch",
        "configs/runs/pretrain-quickstart.yaml", "patches/README.md",
    } <= names  # fmt: skip


def use(built: Built, folder: Path, *arguments: str) -> str:
    """Output of a command of the installed wheel, in an empty folder."""
    done = subprocess.run(
        [sys.executable, "-m", "megatron_seqpar", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(built.site), "COLUMNS": "160"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_works_from_an_empty_folder(built: Built, tmp_path: Path) -> None:
    assert use(built, tmp_path, "--version") == f"megatron-seqpar {megatron_seqpar.__version__}\n"
    assert "--retry" in use(built, tmp_path, "compare", "--help")
    planned = use(built, tmp_path, "plan", "--model", "llama2-7b", "--seq-length", "65536",
        "--global-batch-tokens", "1M", "--cluster", "dgx-a100-x1", "--json")  # fmt: skip
    assert '"layouts"' in planned
    shown = use(
        built, tmp_path, "run", "--config", "pretrain-quickstart", "--dry-run", "--no-check"
    )
    assert f"{built.site}/megatron_seqpar/scripts/pretrain_gpt.py" in shown
    drawn = use(built, tmp_path, "schedule", "--size", "4", "--seq-length", "64",
        "--cluster", "dgx-h100-x1", "--json")  # fmt: skip
    assert '"schedule"' in drawn or '"steps"' in drawn
    assert list(tmp_path.iterdir()) == []
