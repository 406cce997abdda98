# SPDX-License-Identifier: Apache-2.0
"""Is this a Python that the package runs on?"""

from __future__ import annotations

import platform
import sys

from ..finding import Asked, Finding, Status
from ..machine import Machine
from ..tested import TESTED, family

OLDEST = (3, 11)


def check(asked: Asked, machine: Machine) -> Finding:
    """The interpreter's version against what is needed and what is tested."""
    found, tested = platform.python_version(), TESTED["python"]
    text = f"Python {found}, {sys.executable}"
    fix = f"make an environment of Python {tested}: python{tested} -m venv .venv"
    if sys.version_info[:2] < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        return Finding("python", Status.PROBLEM, f"{text}; {oldest} or later is needed", fix=fix)
    if family(found) != tested:
        return Finding("python", Status.WARNING, f"{text}; tested with {tested}", fix=fix)
    return Finding("python", Status.OK, text)
