# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterator

import pytest
import torch

from tests.support.pool import GlooPool


@pytest.fixture(scope="session")
def six_ranks() -> Iterator[GlooPool]:
    """Six processes in one gloo world."""
    pool = GlooPool(6)
    yield pool
    pool.stop()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Ranks are threads here: kernels that spread over the cores would fight."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
