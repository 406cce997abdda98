# SPDX-License-Identifier: Apache-2.0
"""Megatron's index builder is taken ready-made where it cannot be compiled."""

import importlib.machinery
import sys
from pathlib import Path

import pytest

from megatron_seqpar.launcher.dataset_helpers import built_helpers, use_built_helpers
from tests.cpu_runtime.fresh_process import run_fresh

SUFFIX = importlib.machinery.EXTENSION_SUFFIXES[0]


def make_checkout(folder: Path, *, built: bool) -> Path:
    datasets = folder / "megatron" / "core" / "datasets"
    datasets.mkdir(parents=True)
    if built:
        (datasets / f"helpers_cpp{SUFFIX}").write_bytes(b"")
    return folder


def test_the_first_built_module_on_the_path_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_checkout(tmp_path / "source", built=False)
    wheel = make_checkout(tmp_path / "wheel", built=True)
    monkeypatch.setattr(sys, "path", [str(source), str(wheel)])
    found = built_helpers()
    assert found is not None
    assert found.is_relative_to(wheel)
    monkeypatch.setattr(sys, "path", [str(source)])
    assert built_helpers() is None


def build_index_without_make() -> list[int]:
    """Blending indices from the C++ module; `make` would exit here, for want of a Makefile."""
    use_built_helpers()
    import numpy
    from megatron.core.datasets import utils

    utils.compile_helpers()
    from megatron.core.datasets import helpers

    datasets, samples = numpy.zeros(4, dtype=numpy.int16), numpy.zeros(4, dtype=numpy.int64)
    helpers.build_blending_indices(datasets, samples, numpy.array([0.5, 0.5]), 2, 4, False)
    return datasets.tolist()


def test_the_wheels_module_is_used() -> None:
    assert run_fresh(build_index_without_make) == [0, 1, 0, 1]
