# SPDX-License-Identifier: Apache-2.0
"""What a schedule builder returns."""

from __future__ import annotations

from typing import NamedTuple

from .ir import Placed, Transfer


class Placement(NamedTuple):
    """Placed rectangles, and what the builder says of routes.

    Attributes:
        tiles: who computes which rectangle when.
        relay: KV transfers `(step, transfer)` where ranks pass on what they received.
        gateways: whether keys and values cross between nodes once a node.
    """

    tiles: list[Placed]
    relay: list[tuple[int, Transfer]] | None = None
    gateways: bool = False
