# SPDX-License-Identifier: Apache-2.0
"""Failures that follow from another one: mending that mends both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .finding import Finding, Status
from .folders import unwritable_caches
from .machine import Machine

_OF_FILES = ("FileExistsError", "NotADirectoryError", "PermissionError", "OSError")


def consequence(name: str, facts: Mapping[str, Any], machine: Machine) -> Finding | None:
    """The finding of a failed stage whose cause is told by another check; None if it is its own.

    Without torch nothing else can be imported. A library that makes its cache folder on import
    fails where that cannot be written.
    """
    if "error" not in facts:
        return None
    broken = machine.stage("torch")
    if "error" in broken and facts is not broken:
        return Finding(name, Status.ABSENT, "not looked at: it needs torch", "mend torch first")
    of_files = str(facts["error"]).startswith(_OF_FILES)
    if of_files and unwritable_caches(machine.environ):
        return Finding(name, Status.ABSENT, str(facts["error"]), "mend the folders first")
    return None
