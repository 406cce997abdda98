# SPDX-License-Identifier: Apache-2.0
"""Child processes: checkpoint writers and data workers start a fresh Python, which has no patches.

`arm()` puts the folder `site/` on PYTHONPATH. Python runs its `sitecustomize.py` at start-up; it
waits for the import of torch and activates the runtime right after it.
"""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "SEQPAR_CPU_RUNTIME"
"""Environment variable that tells a child process to activate the runtime."""
_CHILD = "SEQPAR_CPU_RUNTIME_PARENT"
SITE = Path(__file__).with_name("site")


def arm() -> None:
    """Make the processes that this one starts from now on activate the runtime too."""
    os.environ[VARIABLE] = "1"
    os.environ.setdefault(_CHILD, str(os.getpid()))
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if str(SITE) not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(SITE), *filter(None, paths)])


def is_child() -> bool:
    """Whether a parent process armed this one."""
    return os.environ.get(_CHILD, str(os.getpid())) != str(os.getpid())
