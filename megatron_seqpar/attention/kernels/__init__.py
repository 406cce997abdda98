# SPDX-License-Identifier: Apache-2.0
"""Attention kernels for one tile: a registry, and one small file a backend.

To add one: write a file with a class that has `forward` and `backward` as in `base.Kernel` and an
`unavailable()` function, and add a record to `registry.KERNELS`.
"""

from .base import Kernel, KernelRecord, TileCall
from .registry import KERNELS, names, report, select

__all__ = ["KERNELS", "Kernel", "KernelRecord", "TileCall", "names", "report", "select"]
