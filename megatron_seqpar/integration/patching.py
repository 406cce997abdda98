# SPDX-License-Identifier: Apache-2.0
"""Replace named attributes of Megatron, once, and put them back.

A `PatchPoint` names one dotted symbol, the versions of megatron-core it was read in and why it
must change; its `build` makes the replacement from the original. `apply` also finds copies that
other modules made with `from x import y`, and `undo` restores all of them.
"""

from __future__ import annotations

import importlib
import sys
import types
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from megatron_seqpar import compatibility
from megatron_seqpar.compatibility import numbers
from megatron_seqpar.errors import SeqParError

MARKER = "__seqpar_original__"
"""Attribute of a replacement that holds the original."""


class MissingSymbolError(SeqParError, ImportError):
    """A patch point that the installed Megatron does not have."""


@dataclass(frozen=True)
class PatchPoint:
    """One symbol of Megatron that the plugin replaces.

    symbol: dotted path of a module attribute or of a class attribute.
    build: makes the replacement from the original.
    versions: the families of megatron-core (`compatibility.FAMILIES`) that it was checked on; one
        symbol may have several points, for different families.
    why: what goes wrong without it; printed in the documentation's table.
    optional: the holder may be absent (a part of Megatron that ships apart from the core, or a
        class whose library is not installed).
    """

    symbol: str
    build: Callable[[Any], Any]
    versions: tuple[str, ...]
    why: str
    optional: bool = False


@dataclass
class _Applied:
    """What `undo` needs: where the replacement went and what was there before."""

    places: list[tuple[Any, str]] = field(default_factory=list)
    original: Any = None
    replacement: Any = None
    was_classmethod: bool = False


def resolve(symbol: str) -> tuple[Any, str]:
    """The object that holds `symbol`'s last name, and that name.

    Imports the longest prefix that is a module, then walks attributes. Raises ImportError when
    no module prefix can be imported and AttributeError when an attribute is missing.
    """
    parts = symbol.split(".")
    absent: ModuleNotFoundError | None = None
    for cut in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:cut])
        try:
            holder: Any = importlib.import_module(name)
        except ModuleNotFoundError as error:
            # Only "this very prefix is not a module" lets the search go on; a module that
            # exists but cannot import something of its own is a real failure.
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise
            absent = error
            continue
        for attribute in parts[cut:-1]:
            if absent is not None and not hasattr(holder, attribute):
                raise absent
            holder = getattr(holder, attribute)
        return holder, parts[-1]
    raise absent or ModuleNotFoundError(f"{symbol} names no module", name=parts[0])


def mark(replacement: Any, original: Any) -> Any:
    """Record the original on a replacement; returns the replacement."""
    setattr(replacement, MARKER, original)
    return replacement


class Patcher:
    """Applies a table of patch points and undoes it. Both are idempotent."""

    def __init__(self, points: Iterable[PatchPoint], version: str) -> None:
        """`version` is the running megatron-core, e.g. '0.19.2'."""
        self.points = tuple(points)
        self.version = version
        self._applied: list[_Applied] = []
        self._warned = False

    @property
    def applied(self) -> bool:
        """Whether the table is in force."""
        return bool(self._applied)

    def known_versions(self) -> list[str]:
        """The `major.minor` versions that any point was checked on, oldest first."""
        known = {version for point in self.points for version in point.versions}
        return sorted(known, key=numbers)

    def nearest_version(self) -> str:
        """The checked version that is closest to the running one."""
        known = self.known_versions()
        return min(known, key=lambda version: compatibility.distance(version, self.version))

    def apply(self) -> None:
        """Replace every symbol of the table.

        Warns once when the running version was not checked. Raises `MissingSymbolError`, with
        nothing left replaced, when a symbol that must exist does not.
        """
        if self.applied:
            return
        nearest = self.nearest_version()
        if compatibility.family(self.version) != nearest and not self._warned:
            self._warned = True
            warnings.warn(
                f"megatron_seqpar was checked on megatron-core {', '.join(self.known_versions())}; "
                f"this is {self.version}. Using the patch points of {nearest}.",
                stacklevel=3,
            )
        try:
            for point in self.points:
                if nearest in point.versions:
                    self._apply_one(point, nearest)
            self._sweep()
        except BaseException:
            self.undo()
            raise

    def _apply_one(self, point: PatchPoint, nearest: str) -> None:
        try:
            holder, name = resolve(point.symbol)
            current = getattr(holder, name)
        except (ImportError, AttributeError) as error:
            absent = error.name if isinstance(error, ModuleNotFoundError) else None
            if absent is not None and f"{point.symbol}.".startswith(f"{absent}."):
                if point.optional:
                    return
            elif absent is not None and not absent.startswith("megatron."):
                raise MissingSymbolError(
                    f"{point.symbol} cannot be imported: {error}. Megatron {self.version} needs "
                    f"it: pip install {absent.split('.')[0]}"
                ) from error
            checked = compatibility.nearest(nearest).version
            raise MissingSymbolError(
                f"megatron-core {self.version} has no {point.symbol}, which megatron_seqpar "
                f"must replace ({point.why}). The nearest version it was checked on is "
                f"{checked}: pip install 'megatron-core=={checked}'"
            ) from error
        if not isinstance(holder, (type, types.ModuleType)) and point.optional:
            # Megatron stands in mock objects for libraries that are not installed.
            return
        if hasattr(current, MARKER):
            return
        stored = vars(holder).get(name, current) if isinstance(holder, type) else current
        replacement = mark(point.build(current), stored)
        applied = _Applied(original=stored, replacement=replacement)
        if isinstance(stored, classmethod):
            applied.was_classmethod = True
            setattr(holder, name, classmethod(replacement))
        else:
            setattr(holder, name, replacement)
        applied.places.append((holder, name))
        self._applied.append(applied)

    def _sweep(self) -> None:
        """Replace copies of the originals that other modules hold by name."""
        wanted = {id(item.original): item for item in self._applied if not item.was_classmethod}
        for module in list(sys.modules.values()):
            if not isinstance(module, types.ModuleType):
                continue
            for name, value in list(vars(module).items()):
                item = wanted.get(id(value))
                if item is not None and name != MARKER:
                    setattr(module, name, item.replacement)
                    item.places.append((module, name))

    def undo(self) -> None:
        """Restore every original, also in modules that copied a replacement by name."""
        back = {id(item.replacement): item for item in self._applied}
        for module in list(sys.modules.values()):
            if not isinstance(module, types.ModuleType):
                continue
            for name, value in list(vars(module).items()):
                item = back.get(id(value))
                if item is not None:
                    setattr(module, name, item.original)
        for item in reversed(self._applied):
            for holder, name in item.places:
                setattr(holder, name, item.original)
        self._applied.clear()
