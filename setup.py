# SPDX-License-Identifier: Apache-2.0
"""Packaging of megatron_seqpar; the tools' settings live in pyproject.toml.

Version ranges here say what the code needs; requirements/constraints.txt says what it is tested
with, and the set-up scripts install exactly that.
"""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent


def version() -> str:
    """The version written in the package, read without importing it."""
    text = (HERE / "megatron_seqpar" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
    if found is None:
        raise RuntimeError("megatron_seqpar/__init__.py states no __version__")
    return found.group(1)


class BuildWithFiles(build_py):
    """Puts files into the package that an installed one looks for there.

    Clusters and models of configs/, and the pretraining script that benchmarks run.
    """

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for folder, pattern in (
            ("configs/clusters", "*.yaml"),
            ("configs/planner", "*.yaml"),
            ("configs/models", "*.yaml"),
            ("scripts", "pretrain_gpt.py"),
        ):
            target = Path(self.build_lib) / "megatron_seqpar" / folder
            target.mkdir(parents=True, exist_ok=True)
            for path in sorted((HERE / folder).glob(pattern)):
                shutil.copyfile(path, target / path.name)


PLOT = ["matplotlib", "tensorboard"]

setup(
    name="megatron_seqpar",
    version=version(),
    description="A sequence-parallel dimension for Megatron-LM",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_seqpar", "megatron_seqpar.*"]),
    package_data={"megatron_seqpar": ["py.typed", "cpu_runtime/site/*.py"]},
    install_requires=[
        "torch>=2.6",
        "megatron-core>=0.19.0",
        "numpy",
        "packaging",
        "einops",  # Megatron imports it for hierarchical groups without declaring it
        "psutil",  # Megatron's torch_dist checkpoints import it without declaring it
        "typer",
        "rich",
        "PyYAML",
        "pydantic>=2",
    ],
    extras_require={
        "te": ["transformer-engine[pytorch]>=2.0"],
        "flash": ["flash-attn>=2.7,<2.9"],
        "gpu": ["nvidia-ml-py"],
        "plot": PLOT,
        "dev": [
            *PLOT,
            "pytest",
            "pytest-timeout",
            "pytest-benchmark",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "mypy",
            "types-PyYAML",
        ],
    },
    cmdclass={"build_py": BuildWithFiles},
    entry_points={"console_scripts": ["megatron-seqpar = megatron_seqpar.cli:main"]},
)
