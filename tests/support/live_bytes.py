# SPDX-License-Identifier: Apache-2.0
"""How many bytes of tensors are alive, counted operation by operation: memory without a clock."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Tensors made inside, counted by their storages.

    peak: the most bytes that they have held at once. live: what they hold. largest: the largest.
    """

    def __init__(self, given=()) -> None:
        """given: tensors made before, whose views do not count."""
        super().__init__()
        self.live = self.peak = self.largest = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in given}

    def _freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self.known:
                continue
            self.known.add(key)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            self.largest = max(self.largest, storage.nbytes())
            weakref.finalize(storage, self._freed, key, storage.nbytes())
        return result
