# SPDX-License-Identifier: Apache-2.0
"""The folders that compilers of kernels keep their work in."""

from __future__ import annotations

import getpass
import tempfile
from collections.abc import Mapping
from pathlib import Path


def caches(environ: Mapping[str, str]) -> dict[str, Path]:
    """Variable -> the folder that it names, or that is taken without it."""
    home = Path(environ.get("HOME") or Path.home())
    cache = Path(environ.get("XDG_CACHE_HOME") or home / ".cache")
    temporary = Path(environ.get("TMPDIR") or tempfile.gettempdir())
    user = environ.get("USER") or _user()
    folders = {
        "TMPDIR": temporary,
        "TRITON_CACHE_DIR": Path(environ.get("TRITON_HOME") or home) / ".triton" / "cache",
        "TORCHINDUCTOR_CACHE_DIR": temporary / f"torchinductor_{user}",
        "TORCH_EXTENSIONS_DIR": cache / "torch_extensions",
    }
    return {name: Path(environ.get(name) or folder) for name, folder in folders.items()}


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user without a name, as in some containers
        return "unknown"


def unwritable(folder: Path) -> str | None:
    """Why files cannot be made in `folder`, or None; leaves nothing behind.

    Where the folder is not there yet, the nearest one above it must let it be made.
    """
    nearest = folder.absolute()
    try:
        while not nearest.exists() and nearest != nearest.parent:
            nearest = nearest.parent
        if not nearest.is_dir():
            return f"{nearest} is a file"
        with tempfile.TemporaryFile(dir=nearest):
            return None
    except OSError as error:
        return f"{nearest}: {error.strerror or error}"


def unwritable_caches(environ: Mapping[str, str]) -> dict[str, str]:
    """Variable -> why its folder cannot be written, of those that cannot."""
    found = caches(environ).items()
    return {name: why for name, folder in found if (why := unwritable(folder)) is not None}
