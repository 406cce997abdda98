# SPDX-License-Identifier: Apache-2.0
"""NCCL means gloo. The collectives themselves are left alone: gloo has those that Megatron uses.

In particular nothing touches ReduceOp.AVG: gloo averages by itself, and an emulation would be
wrong inside a coalescing manager, where the division would run before the sum.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from .registry import replace, unit


def to_gloo(backend: Any) -> Any:
    """A backend string with gloo for NCCL: 'nccl' and 'cpu:gloo,cuda:nccl' are 'gloo'."""
    if not isinstance(backend, str) or "nccl" not in backend:
        return backend
    return "gloo"


def _replace_in_c10d(name: str, make: Callable[[Any], Any]) -> None:
    c10d = torch.distributed.distributed_c10d
    original = getattr(c10d, name)
    new = functools.wraps(original)(make(original))
    replace(c10d, **{name: new})
    if getattr(torch.distributed, name, None) is original:
        replace(torch.distributed, **{name: new})


@unit
def gloo_for_nccl() -> None:
    """Process groups that ask for NCCL, or carry its options, are gloo groups without options.

    Serves: core/parallel_state.py (`create_group(backend="nccl", pg_options=...)`),
    training/initialize.py (`init_process_group(device_id=...)`), torch checkpoint planners.
    """

    def make(original: Any) -> Any:
        def on_gloo(*args: Any, **kwargs: Any) -> Any:
            if args and isinstance(args[0], str):
                args = (to_gloo(args[0]), *args[1:])
            if "backend" in kwargs:
                kwargs["backend"] = to_gloo(kwargs["backend"])
            if "NCCL" in type(kwargs.get("pg_options")).__qualname__:
                kwargs["pg_options"] = None
            kwargs.pop("device_id", None)
            return original(*args, **kwargs)

        return on_gloo

    for name in (
        "init_process_group",
        "new_group",
        "new_subgroups",
        "new_subgroups_by_enumeration",
    ):
        _replace_in_c10d(name, make)
