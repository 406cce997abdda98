# SPDX-License-Identifier: Apache-2.0
"""Can the folders be written that compilers of kernels keep their work in?"""

from __future__ import annotations

import shlex
from pathlib import Path

from ..finding import Asked, Finding, Status
from ..folders import caches, unwritable, unwritable_caches
from ..machine import Machine


def check(asked: Asked, machine: Machine) -> Finding:
    """The caches of Triton, torch.compile and torch's extensions, and the temporary folder."""
    found = caches(machine.environ)
    wrong = unwritable_caches(machine.environ)
    details = tuple(f"{name}: {folder}" for name, folder in found.items())
    data = {"folders": {name: str(folder) for name, folder in found.items()}, "wrong": wrong}
    if not wrong:
        text = "caches and the temporary folder can be written"
        return Finding("folders", Status.OK, text, details=details, data=data)
    text = "; ".join(f"{name} cannot be written: {why}" for name, why in wrong.items())
    fix = "; ".join(f"export {name}={shlex.quote(str(_other(name)))}" for name in wrong)
    return Finding("folders", Status.PROBLEM, text, fix, details, data)


def _other(name: str) -> Path:
    """A folder that can be written in place of that of a variable."""
    places = [Path.home() / ".cache", Path("/var/tmp"), Path("/dev/shm")]
    base = next((place for place in places if unwritable(place) is None), Path.cwd())
    return base if name == "TMPDIR" else base / name.lower().removesuffix("_dir")
