# SPDX-License-Identifier: Apache-2.0
"""What a part of the check is told, and what it answers."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class Scale(StrEnum):
    """How much a part does."""

    FULL = "full"
    QUICK = "quick"
    TINY = "tiny"  # what a CPU does in seconds: tries the code out


@dataclass(frozen=True)
class Settings:
    """What one part is told.

    Attributes:
        device: "cuda" or "cpu".
        scale: how much to do.
        seconds: after this time a part begins nothing new, and says what it left out.
        kernel: the kernel that this run of the part is about; "auto" where it is about none.
        work: a folder for what need not be kept.
        tests: what the part "tests" hands to pytest.
    """

    device: torch.device
    scale: Scale
    seconds: float
    work: Path
    kernel: str = "auto"
    tests: tuple[str, ...] = ("tests",)
    started: float = field(default_factory=time.monotonic)

    @property
    def on_gpu(self) -> bool:
        """Whether there are streams."""
        return self.device.type == "cuda"

    @property
    def half(self) -> torch.dtype:
        """The dtype of training."""
        return torch.bfloat16

    @property
    def time_is_up(self) -> bool:
        """Whether to begin nothing new."""
        return time.monotonic() - self.started > self.seconds

    def pick(self, *, full: T, quick: T, tiny: T) -> T:
        """The value for this scale."""
        return {Scale.FULL: full, Scale.QUICK: quick, Scale.TINY: tiny}[self.scale]


@dataclass
class Outcome:
    """What a part found.

    Attributes:
        says: the result in one line.
        failures: what is wrong, one line each; empty when all is right.
        left_out: what was not done, and why.
        nothing: nothing at all was done.
        data: everything measured, in plain types.
    """

    says: str = ""
    failures: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    nothing: bool = False
    data: dict[str, Any] = field(default_factory=dict)
