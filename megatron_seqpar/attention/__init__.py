# SPDX-License-Identifier: Apache-2.0
"""Distributed FlashAttention over the SP axis; knows torch and nothing of Megatron.

Read in this order: `layouts` (which tokens a rank owns) -> `masks` (which pairs interact) -> `ir`
(tiles, transfers, steps) -> `schedules/` (who computes which tile when) -> `assemble`, `verify`,
`schedule` (what moves, the proof, the numbers; no torch up to here) -> `kernels/`, `transport`,
`merge`, `operands` -> `execute` -> `api`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .ir import Payload, Problem, Route, Step, Tile, Transfer
from .layouts import Span, TokenLayout, even_lengths
from .masks import (
    Causal,
    Documents,
    Full,
    Mask,
    Prefix,
    Ranges,
    Region,
    SlidingWindow,
    as_mask,
)
from .schedule import Schedule
from .schedules import build_schedule

if TYPE_CHECKING:
    from .api import dist_flash_attention
    from .counters import Counters
    from .transport import LocalTransport, ProcessGroupTransport, ThreadTransport, Transport

__all__ = [
    "Causal",
    "Counters",
    "Documents",
    "Full",
    "LocalTransport",
    "Mask",
    "Payload",
    "Prefix",
    "Problem",
    "ProcessGroupTransport",
    "Ranges",
    "Region",
    "Route",
    "Schedule",
    "SlidingWindow",
    "Span",
    "Step",
    "ThreadTransport",
    "Tile",
    "TokenLayout",
    "Transfer",
    "Transport",
    "as_mask",
    "build_schedule",
    "dist_flash_attention",
    "even_lengths",
]

_LAZY = {
    "dist_flash_attention": "api",
    "Counters": "counters",
    "LocalTransport": "transport",
    "ProcessGroupTransport": "transport",
    "ThreadTransport": "transport",
    "Transport": "transport",
}


def __getattr__(name: str) -> Any:
    # schedules are planned, drawn and proved without torch; only running them imports it
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
