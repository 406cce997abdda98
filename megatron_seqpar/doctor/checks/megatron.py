# SPDX-License-Identifier: Apache-2.0
"""Is Megatron there, and does it have everything that the plugin replaces?"""

from __future__ import annotations

from ..causes import consequence
from ..finding import Asked, Finding, Status
from ..machine import Machine
from ..tested import MEGATRON_FAMILIES, TESTED, family, pinned, pip_install

NAME = "megatron-core"


def check(asked: Asked, machine: Machine) -> Finding:
    """Its version, its training package, and a trial of the plugin's patches."""
    facts, tested = machine.stage("megatron"), TESTED[NAME]
    fix = pip_install(pinned(NAME))
    follows = consequence(NAME, facts, machine)
    if follows is not None:
        return follows
    if "error" in facts:
        gone = str(facts.get("module") or "").split(".")[0] == "megatron"
        text = "megatron-core is not installed" if gone else str(facts["error"])
        fix = pip_install(pinned(NAME), again=not gone)
        return Finding(NAME, Status.PROBLEM, text, fix=fix, data=facts)
    version = facts["version"]
    text = f"megatron-core {version}, all that the plugin replaces is there"
    if facts["training_error"] is not None:
        return Finding(
            NAME,
            Status.WARNING,
            f"{text}; without megatron.training ({facts['training_error']}) only scripts in a "
            "Megatron-LM checkout run",
            fix=fix,
            data=facts,
        )
    if family(version) not in MEGATRON_FAMILIES:
        known = ", ".join(MEGATRON_FAMILIES)
        return Finding(
            NAME, Status.WARNING, f"{text}; read in {known}, tested with {tested}", fix=fix,
            data=facts,
        )  # fmt: skip
    return Finding(NAME, Status.OK, text, data=facts)
