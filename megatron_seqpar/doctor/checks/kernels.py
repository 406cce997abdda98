# SPDX-License-Identifier: Apache-2.0
"""Which attention kernels are there, which does 'auto' take, and why not the others?"""

from __future__ import annotations

from typing import Any

from ..causes import consequence
from ..finding import Asked, Finding, Status
from ..machine import Machine
from ..tested import pinned, pip_install

REFERENCE = "reference"


def check(asked: Asked, machine: Machine) -> Finding:
    """The choice for bfloat16 on a GPU where there is one, and for float32 on the CPU."""
    facts = machine.stage("kernels")
    follows = consequence("kernels", facts, machine)
    if follows is not None:
        return follows
    if "error" in facts:
        fix = pip_install(pinned("torch"), again=True)
        return Finding("kernels", Status.PROBLEM, str(facts["error"]), fix=fix, data=facts)
    calls = [name for name in facts["chosen"] if not name.endswith(" error")]
    text = ", ".join(f"{facts['chosen'][call]} for {call}" for call in calls)
    details = tuple(_line(backend, facts["chosen"], calls) for backend in facts["backends"])
    for call in calls:
        chosen = facts["chosen"][call]
        if chosen is None:
            why = facts["chosen"][f"{call} error"]
            fix = pip_install(pinned("torch"), again=True)
            return Finding(
                "kernels", Status.PROBLEM, f"none for {call}: {why}", fix, details, facts
            )
        if chosen == REFERENCE:
            fix = pip_install("megatron_seqpar[flash]")
            text += " (right, but slow)"
            return Finding("kernels", Status.WARNING, text, fix, details, facts)
    return Finding("kernels", Status.OK, text, details=details, data=facts)


def _line(backend: dict[str, Any], chosen: dict[str, Any], calls: list[str]) -> str:
    """'flash2: flash-attn is not installed (needs ...)'."""
    name = backend["name"]
    if backend["unavailable"] is not None:
        return f"{name}: {backend['unavailable']}"
    verdicts = []
    for call in calls:
        if chosen[call] == name:
            verdicts.append(f"chosen for {call}")
        elif backend["refuses"][call] is not None:
            verdicts.append(backend["refuses"][call])
        else:
            verdicts.append(f"serves {call} too; {chosen[call]} comes first")
    return f"{name}: {'; '.join(verdicts)}"
