# SPDX-License-Identifier: Apache-2.0
"""What a check answers, and what it was asked about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Status(StrEnum):
    """How things are: only a problem makes an installation unhealthy.

    WARNING: it works, but not as it should; ABSENT: something that this machine need not have.
    """

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"
    ABSENT = "absent"


@dataclass(frozen=True)
class Finding:
    """The answer of one check.

    Attributes:
        name: what was looked at, in a word or two.
        text: what was found, in a sentence.
        fix: what mends it, a command where there is one; a problem always has it.
        details: further lines for people.
        data: the same for programs: what JSON can hold.
    """

    name: str
    status: Status
    text: str
    fix: str | None = None
    details: tuple[str, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.status is Status.PROBLEM and not self.fix:
            raise ValueError(f"the problem {self.name!r} has no fix")

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "name": self.name,
            "status": str(self.status),
            "text": self.text,
            "fix": self.fix,
            "details": list(self.details),
            "data": dict(self.data),
        }


@dataclass(frozen=True)
class Asked:
    """What the user wants to run.

    Attributes:
        world: processes of the run; None for as few as the parallel layout needs.
        tp, pp, sp: tensor, pipeline and sequence-parallel sizes.
        nproc: processes of this machine, which the self-test starts.
        device: auto, cuda or cpu.
        extras: extras of the package that must be there.
    """

    world: int | None = None
    tp: int = 1
    pp: int = 1
    sp: int = 1
    nproc: int = 2
    device: str = "auto"
    extras: tuple[str, ...] = ()
