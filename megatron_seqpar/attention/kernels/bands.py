# SPDX-License-Identifier: Apache-2.0
"""Bands of diagonals for kernels that serve only some of them: cut, compute, put together.

`pieces.py` cuts the tile. Blocks of one piece go to the kernel together, as a batch; an inverse
square goes to it with queries and keys read backwards, unless it serves that as it is. Partial
outputs are merged by their log-sum-exp and gradients added up, both in fp32, as between ranks; so
the result is exact, and costs no work on pairs that do not interact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from ..merge import GradAccumulator, OutputAccumulator
from .base import Bands, Kernel, TileCall
from .pieces import pieces

Serves = Callable[[int, int, TileCall], bool]
"""(queries, keys, call) of a tile -> whether the kernel computes it rightly in one call."""


def plain(sq: int, skv: int, call: TileCall) -> bool:
    """Only what is full, and causal squares."""
    return call.full or call.causal_square(sq, skv)


def not_tall(sq: int, skv: int, call: TileCall) -> bool:
    """All but bands that FlashAttention 2 reads otherwise where queries outnumber keys.

    It takes a window of at least `skv` keys for no limit, and gives a side without limit a window
    of `skv` keys when the other side has one. Both are right only while `sq - skv <= 1`, for
    windows are counted from a diagonal that ends in the last query and the last key.
    """
    if plain(sq, skv, call) or sq <= skv + 1:
        return True
    left, right = call.windows(sq, skv)
    return right < skv and (left < 0 or right >= 0)


_SERVES: dict[Bands, Serves] = {Bands.NONE: plain, Bands.NOT_TALL: not_tall}


class _Cut(NamedTuple):
    """One kernel call: where its queries and keys lie, in how many blocks, and which way round."""

    q: slice
    kv: slice
    blocks: int
    backwards: bool
    call: TileCall

    def queries(self, tensor: torch.Tensor) -> torch.Tensor:
        """`[b, sq, ...]` of the tile -> `[b * blocks, rows, ...]` for the kernel."""
        return self._batch(tensor[:, self.q])

    def keys(self, tensor: torch.Tensor) -> torch.Tensor:
        """`[b, skv, ...]` of the tile -> `[b * blocks, cols, ...]` for the kernel."""
        return self._batch(tensor[:, self.kv])

    def _batch(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.blocks > 1:
            tensor = tensor.unflatten(1, (self.blocks, -1)).flatten(0, 1)
        return tensor.flip(1) if self.backwards else tensor

    def whole(self, tensor: torch.Tensor) -> torch.Tensor:
        """`[b * blocks, rows, ...]` of the kernel -> `[b, blocks * rows, ...]` of the tile."""
        tensor = tensor.flip(1) if self.backwards else tensor
        if self.blocks == 1:
            return tensor
        whole: torch.Tensor = tensor.unflatten(0, (-1, self.blocks)).flatten(1, 2)
        return whole


class CutBands:
    """See `base.Kernel`: the kernel `inner` of a record with `bands`, for every band."""

    def __init__(self, inner: Kernel, bands: Bands) -> None:
        self.inner, self.serves = inner, _SERVES[bands]

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: TileCall
    ) -> tuple[torch.Tensor, torch.Tensor]:
        sq, skv = q.shape[1], k.shape[1]
        if self.serves(sq, skv, call):
            return self.inner.forward(q, k, v, call)
        merged = OutputAccumulator(v, sq, q.shape[2])
        for cut in self._cuts(sq, skv, call):
            out, lse = self.inner.forward(cut.queries(q), cut.keys(k), cut.keys(v), cut.call)
            merged.add(cut.whole(out), cut.whole(lse.transpose(1, 2)).transpose(1, 2), cut.q)
        return merged.result()

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        call: TileCall,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        sq, skv = q.shape[1], k.shape[1]
        if self.serves(sq, skv, call):
            return self.inner.backward(dout, q, k, v, out, lse, call)
        dq = GradAccumulator(q, sq, q.shape[2])
        dk, dv = (GradAccumulator(t, skv, t.shape[2]) for t in (k, v))
        for cut in self._cuts(sq, skv, call):
            parts = self.inner.backward(
                cut.queries(dout), cut.queries(q), cut.keys(k), cut.keys(v), cut.queries(out),
                cut.queries(lse.transpose(1, 2)).transpose(1, 2), cut.call,
            )  # fmt: skip
            dq.add(cut.whole(parts[0]), cut.q)
            dk.add(cut.whole(parts[1]), cut.kv)
            dv.add(cut.whole(parts[2]), cut.kv)
        return dq.result(), dk.result(), dv.result()

    def _cuts(self, sq: int, skv: int, call: TileCall) -> Iterator[_Cut]:
        for piece in pieces(sq, skv, call.low, call.high):
            own = call._replace(low=piece.low, high=piece.high)
            backwards = not self.serves(piece.rows, piece.cols, own)
            if backwards:  # an inverse square
                own = call._replace(low=None, high=0)
            yield _Cut(*piece.ranges, piece.blocks, backwards, own)
