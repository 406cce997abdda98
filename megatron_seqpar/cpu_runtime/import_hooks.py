# SPDX-License-Identifier: Apache-2.0
"""Run a function on a module right after its first import, before anyone takes names from it."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

Hook = Callable[[ModuleType], None]


class PostImportFinder(importlib.abc.MetaPathFinder):
    """A finder that finds nothing itself: it asks the others and adds the hooks to their loader."""

    def __init__(self) -> None:
        self.hooks: dict[str, list[Hook]] = {}
        self._searching: set[str] = set()

    def find_spec(
        self, fullname: str, path: Any = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The other finders' spec for a hooked module; None for any other."""
        if fullname not in self.hooks or fullname in self._searching:
            return None
        self._searching.add(fullname)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._searching.discard(fullname)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            for hook in self.hooks.pop(fullname, ()):
                hook(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


_finder = PostImportFinder()


def after_import(name: str, hook: Hook) -> None:
    """Call `hook(module)` when module `name` is first imported, or now if it already is."""
    if name in sys.modules:
        hook(sys.modules[name])
        return
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    _finder.hooks.setdefault(name, []).append(hook)
