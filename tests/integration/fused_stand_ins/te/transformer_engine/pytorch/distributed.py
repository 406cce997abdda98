# SPDX-License-Identifier: Apache-2.0
"""What Megatron takes from here at import."""

import contextlib
from collections.abc import Iterator
from typing import Any


class CudaRNGStatesTracker:
    """The generators of a GPU."""


@contextlib.contextmanager
def activation_recompute_forward(*args: Any, **kwargs: Any) -> Iterator[None]:
    """For FP8's bookkeeping, which is off."""
    yield
