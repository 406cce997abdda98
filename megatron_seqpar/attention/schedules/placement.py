# SPDX-License-Identifier: Apache-2.0
"""What a schedule builder returns."""

from __future__ import annotations

from typing import NamedTuple

from ..ir import Placed, Transfer


class Placement(NamedTuple):
    """Placed tiles, and KV transfers `(step, transfer)` where ranks relay."""

    tiles: list[Placed]
    relay: list[tuple[int, Transfer]] | None = None
