# SPDX-License-Identifier: Apache-2.0
"""Can torch be imported, is it one that works here, and does it see the GPUs that there are?"""

from __future__ import annotations

from ..causes import consequence
from ..finding import Asked, Finding, Status
from ..machine import Machine
from ..tested import TESTED, family, installed, pinned, pip_install, requirements

NAME = "torch"


def check(asked: Asked, machine: Machine) -> Finding:
    """torch's version as installed and as imported, its CUDA and the machine's GPUs."""
    stated, facts = installed(NAME), machine.stage(NAME)
    tested = TESTED[NAME]
    wanted = next((one for one in requirements() or () if one.name == NAME), None)
    if stated is not None and wanted is not None and not wanted.specifier.contains(stated):
        return Finding(
            NAME,
            Status.PROBLEM,
            f"torch {stated} is installed, and {wanted.specifier} is needed ({tested} is tested)",
            fix=pip_install(pinned(NAME)),
            data=facts,
        )
    follows = consequence(NAME, facts, machine)
    if follows is not None:
        return follows
    if "error" in facts:
        gone = facts.get("module") == NAME
        what = "torch is not installed" if gone else f"torch cannot be imported: {facts['error']}"
        fix = pip_install(pinned(NAME), again=not gone)
        return Finding(NAME, Status.PROBLEM, what, fix=fix, data=facts)
    version = facts["version"]
    if stated is not None and stated.split("+")[0] != version.split("+")[0]:
        return Finding(
            NAME,
            Status.PROBLEM,
            f"torch {version} is imported from {facts['file']}, but {stated} is installed",
            fix=pip_install(pinned(NAME), again=True),
            data=facts,
        )
    built = f"built for CUDA {facts['cuda']}" if facts["cuda"] else "built without CUDA"
    text = f"torch {version}, {built}, {len(facts['gpus'])} GPUs"
    problem = _unseen_gpu(facts, machine)
    if problem is not None:
        return Finding(NAME, Status.PROBLEM, f"{text}; {problem[0]}", fix=problem[1], data=facts)
    if family(version) != family(tested):
        return Finding(
            NAME,
            Status.WARNING,
            f"{text}; tested with {tested}",
            fix=pip_install(pinned(NAME)),
            data=facts,
        )
    return Finding(NAME, Status.OK, text, data=facts)


def _unseen_gpu(facts: dict[str, object], machine: Machine) -> tuple[str, str] | None:
    """(why torch sees no GPU though the driver has one, what mends it), or None."""
    if facts["gpus"] or not machine.has_nvidia_device:
        return None
    if not facts["cuda"]:
        return "this machine has a GPU", pip_install(pinned(NAME), again=True)
    if machine.environ.get("CUDA_VISIBLE_DEVICES") is not None:
        value = machine.environ["CUDA_VISIBLE_DEVICES"]
        return None if value == "" else (f"CUDA_VISIBLE_DEVICES={value} hides the GPUs",
                                         "unset CUDA_VISIBLE_DEVICES")  # fmt: skip
    return (
        "the driver has a GPU that CUDA cannot use",
        f"nvidia-smi (install a driver for CUDA {facts['cuda']} or later if it shows an older one)",
    )
