# SPDX-License-Identifier: Apache-2.0
"""The list of patches. Each is one function, a *unit*, that can be left out and is tested alone.

A unit's docstring gives the reason in its first paragraph and ends in a `Serves:` paragraph that
names the Megatron (or torch) code that needs it, read in megatron-core 0.16.1 to 0.19.2
and torch 2.11.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any


@dataclass(frozen=True)
class Unit:
    """One named patch; `apply()` performs it on this process, for good."""

    name: str
    apply: Callable[[], None]

    @property
    def reason(self) -> str:
        """Why the patch exists: its docstring without the `Serves:` paragraph."""
        return (self.apply.__doc__ or "").split("Serves:")[0].strip()

    @property
    def serves(self) -> str:
        """The code that needs the patch."""
        return (self.apply.__doc__ or "").partition("Serves:")[2].strip()


UNITS: dict[str, Unit] = {}


def unit(function: Callable[[], None]) -> Callable[[], None]:
    """Register `function` as the unit of its name; units are applied in order of registration."""
    name = function.__name__
    if name in UNITS:
        raise ValueError(f"two units are named {name!r}")
    UNITS[name] = Unit(name, function)
    return function


def replace(owner: Any, **attributes: Any) -> None:
    """Set `attributes` on `owner`. A function is copied, so that each name has one of its own.

    torch.compile's table of torch functions demands that: it refuses one object under two names
    that it treats differently.
    """
    for name, value in attributes.items():
        setattr(owner, name, _own(value, name) if isinstance(value, FunctionType) else value)


def _own(function: FunctionType, name: str) -> FunctionType:
    own = FunctionType(
        function.__code__, function.__globals__, name, function.__defaults__, function.__closure__
    )
    own.__kwdefaults__ = function.__kwdefaults__
    own.__doc__ = function.__doc__
    own.__dict__.update(function.__dict__)
    return own
