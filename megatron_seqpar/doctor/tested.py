# SPDX-License-Identifier: Apache-2.0
"""The versions that the project is tested with: those of requirements/constraints.txt.

A wheel does not hold that file, so they stand here once more; a test compares the two.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, requires, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packaging.requirements import Requirement

from megatron_seqpar import compatibility

PACKAGE = "megatron_seqpar"
TESTED = {"python": "3.12", "torch": "2.11.0", "megatron-core": "0.19.2"}
MEGATRON_FAMILIES = compatibility.FAMILIES
"""Releases of megatron-core that the plugin was run with."""


def family(number: str) -> str:
    """'2.11' of '2.11.0+cpu'."""
    return ".".join(number.split("+")[0].split(".")[:2])


def installed(distribution: str) -> str | None:
    """The version that the installed package's metadata states, or None."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def requirements(extra: str | None = None) -> list[Requirement] | None:
    """What this package requires: always, or for an extra.

    None when the package itself is not installed (a folder that is only on PYTHONPATH).
    """
    from packaging.requirements import Requirement  # not at the door: it may be what is missing

    try:
        stated = [Requirement(text) for text in requires(PACKAGE) or []]
    except PackageNotFoundError:
        return None
    if extra is None:
        return [one for one in stated if one.marker is None or one.marker.evaluate({"extra": ""})]
    return [
        one
        for one in stated
        if one.marker is not None
        and one.marker.evaluate({"extra": extra})
        and not one.marker.evaluate({"extra": ""})
    ]


def unmet(requirement: Requirement) -> str | None:
    """Why the installed packages do not meet a requirement, or None."""
    found = installed(requirement.name)
    if found is None:
        return f"{requirement.name} is not installed"
    if not requirement.specifier.contains(found, prereleases=True):
        return f"{requirement.name} {found} is installed, and {requirement.specifier} is needed"
    return None


def pip_install(*packages: str, again: bool = False) -> str:
    """The command that installs packages, each 'name' or 'name==version'."""
    force = "--force-reinstall " if again else ""
    return f"python -m pip install {force}{' '.join(repr(package) for package in packages)}"


def pinned(distribution: str) -> str:
    """'torch==2.11.0'."""
    return f"{distribution}=={TESTED[distribution]}"
