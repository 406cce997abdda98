# SPDX-License-Identifier: Apache-2.0
"""For all tests: one thread a process, and `needs_gpu` tests reported as skipped without a GPU."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported anywhere

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("needs_gpu")]
    if not marked:
        return
    import torch

    without = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
    for item in marked:
        item.add_marker(without)
