# SPDX-License-Identifier: Apache-2.0
"""Are the packages there that this one requires, in versions that it can use?"""

from __future__ import annotations

from ..finding import Asked, Finding, Status
from ..machine import Machine
from ..tested import PACKAGE, installed, pip_install, requirements, unmet

_HAVE_THEIR_OWN_CHECK = ("torch", "megatron-core")


def check(asked: Asked, machine: Machine) -> Finding:
    """Every requirement but torch and megatron-core."""
    stated = requirements()
    if stated is None:
        return Finding(
            "packages",
            Status.WARNING,
            f"{PACKAGE} is not installed, so what it requires is not known",
            fix="python -m pip install -e . (in the folder of its setup.py)",
        )
    stated = [one for one in stated if one.name not in _HAVE_THEIR_OWN_CHECK]
    wrong = {one: why for one in stated if (why := unmet(one)) is not None}
    versions = tuple(f"{one.name} {installed(one.name)}" for one in stated if one not in wrong)
    if wrong:
        return Finding(
            "packages",
            Status.PROBLEM,
            "; ".join(wrong.values()),
            fix=pip_install(*(f"{one.name}{one.specifier}" for one in wrong)),
            details=versions,
        )
    text = f"{PACKAGE} {installed(PACKAGE)} and the {len(stated)} packages that it needs"
    return Finding("packages", Status.OK, text, details=versions)
