# SPDX-License-Identifier: Apache-2.0
"""One question a file; each module has `check(asked, machine) -> Finding`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..finding import Asked, Finding, Status
from ..machine import Machine
from . import (
    communication,
    dependencies,
    extras,
    folders,
    gpus,
    kernels,
    layout,
    limits,
    megatron,
    numerics,
    python,
    torch,
)

Check = Callable[[Asked, Machine], Finding]

CHECKS: dict[str, Check] = {
    module.__name__.rpartition(".")[2]: module.check
    for module in (
        python,
        dependencies,
        torch,
        megatron,
        extras,
        kernels,
        gpus,
        communication,
        layout,
        limits,
        folders,
        numerics,
    )
}
"""By name, in the order they are made and shown."""


def examine(asked: Asked, machine: Machine, leave_out: tuple[str, ...] = ()) -> Iterator[Finding]:
    """The findings of all checks but those in `leave_out`, one as soon as it is there."""
    for name, check in CHECKS.items():
        if name in leave_out:
            continue
        try:
            yield check(asked, machine)
        except Exception as error:
            yield Finding(
                name,
                Status.PROBLEM,
                f"the check itself failed: {type(error).__name__}: {error}",
                fix="python -m pip install --force-reinstall megatron_seqpar",
            )
