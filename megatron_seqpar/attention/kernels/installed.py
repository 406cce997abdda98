# SPDX-License-Identifier: Apache-2.0
"""Is a package there, in a version that was read, and does it still take what we pass?

Kernel packages change private signatures between releases. Nothing here is guessed: a version
outside the range that a backend was written for, or a function without a parameter that it passes,
makes the backend unavailable and says so.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

import torch
from packaging.version import InvalidVersion, Version


def no_gpu() -> str | None:
    """Why no CUDA device can be used, or None."""
    if torch.version.cuda is None:
        return "torch is built without CUDA"
    return None if torch.cuda.is_available() else "no CUDA device is present"


def wrong_version(distribution: str, at_least: str, below: str) -> str | None:
    """Why the installed distribution is not in `[at_least, below)`, or None."""
    try:
        found = version(distribution)
        fits = Version(at_least) <= Version(found) < Version(below)
    except PackageNotFoundError:
        return f"{distribution} is not installed"
    except InvalidVersion:
        return f"{distribution} has the unreadable version {found!r}"
    return None if fits else f"{distribution} {found} is outside {at_least} <= version < {below}"


def import_or_reason(name: str) -> tuple[ModuleType | None, str | None]:
    """(module, None), or (None, why it cannot be imported): missing, or built for another torch."""
    try:
        return import_module(name), None
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        return None, f"importing {name} fails: {first}"


def missing_parameters(function: Callable[..., Any], names: Iterable[str]) -> str | None:
    """Which of the parameters `names` a Python function does not take, or None.

    A `torch.library` custom op is judged by its schema.
    """
    overload = getattr(function, "_opoverload", None)
    if overload is not None:
        known = {argument.name for argument in overload._schema.arguments}
    else:
        known = set(inspect.signature(function).parameters)
    missing = [name for name in names if name not in known]
    label = getattr(function, "__name__", str(function))
    return f"{label} takes no parameter {', '.join(missing)}" if missing else None


def schema_differs(
    op: torch._ops.OpOverload, names: Iterable[str], returns: int | None = None
) -> str | None:
    """How an operator differs from (parameters it must have, number of results), or None."""
    schema = op._schema
    known = {argument.name for argument in schema.arguments}
    missing = [name for name in names if name not in known]
    if missing:
        return f"{schema.name} takes no parameter {', '.join(missing)}"
    if returns is not None and len(schema.returns) != returns:
        return f"{schema.name} returns {len(schema.returns)} values, not {returns}"
    return None
