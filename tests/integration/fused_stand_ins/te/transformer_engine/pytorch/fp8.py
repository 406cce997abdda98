# SPDX-License-Identifier: Apache-2.0
"""FP8 is off."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


class FP8GlobalStateManager:
    """Says that FP8 is off."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        return False


@contextlib.contextmanager
def fp8_autocast(*args: Any, **kwargs: Any) -> Iterator[None]:
    yield


fp8_model_init = fp8_autocast
