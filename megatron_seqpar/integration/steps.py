# SPDX-License-Identifier: Apache-2.0
"""Places in Megatron's training loop where the plugin measures.

The report, the trace and the TensorBoard scalars all wrap the same few functions. The patch points
are those of the one table; who wants to be around one of them says so here, and with nobody there
the stock function is called at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]

PLACES = ("train", "train_step", "forward_step", "backward_step")

_around: dict[str, list[Wrap]] = {place: [] for place in PLACES}


def around(place: str, wrap: Wrap) -> None:
    """Put `wrap(original)` in the place of a function, from the next call on.

    place: one of `PLACES`. What is added later is further out. A second time changes nothing.
    """
    if wrap not in _around[place]:
        _around[place].append(wrap)


def remove(place: str, wrap: Wrap) -> None:
    """Undo `around`; harmless when it is not there."""
    if wrap in _around[place]:
        _around[place].remove(wrap)


def _wrapped(place: str, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        function = original
        for wrap in _around[place]:
            function = wrap(function)
        return function(*args, **kwargs)

    return call


def wrap_train(original: Callable[..., Any]) -> Callable[..., Any]:
    """Patch for `training.train`."""
    return _wrapped("train", original)


def wrap_train_step(original: Callable[..., Any]) -> Callable[..., Any]:
    """Patch for `training.train_step`."""
    return _wrapped("train_step", original)


def wrap_forward_step(original: Callable[..., Any]) -> Callable[..., Any]:
    """Patch for `schedules.forward_step`: one micro-batch through this stage's layers."""
    return _wrapped("forward_step", original)


def wrap_backward_step(original: Callable[..., Any]) -> Callable[..., Any]:
    """Patch for `schedules.backward_step`: one micro-batch back through this stage's layers."""
    return _wrapped("backward_step", original)


def iteration() -> int:
    """The number of the step that is running, counted from 1 as Megatron logs it."""
    from megatron.training import get_args

    return int(get_args().curr_iteration) + 1
