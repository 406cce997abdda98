# SPDX-License-Identifier: Apache-2.0
"""What the two fused GPU attention operators of torch have in common.

Both work on `[b, h, s, d]` with any strides whose last is 1, and return nine values: (out, lse,
cum_seq_q, cum_seq_k, max_q, max_k, seed, offset, debug mask). Their backward wants four of these
again: what autograd would hand over from *its* forward. Here the output and LSE come from all keys
of the row, and a rank may run a backward whose forward another rank ran, so the rest is taken from
one tiny forward of the same operator: dtypes and shapes of the (unused, dropout is 0) random state
and the number of dims of the LSE differ between releases, and are thus never guessed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch

from .base import TileCall

FORWARD_RESULTS = 9
GRADIENTS = 3


class Extras(NamedTuple):
    """What backward wants besides tensors of the tile."""

    cum_seq_q: torch.Tensor | None
    cum_seq_k: torch.Tensor | None
    seed: torch.Tensor
    offset: torch.Tensor
    lse_dims: int


class AtenAttention(ABC):
    """See `base.Kernel`. Subclasses order the arguments of their operators."""

    def __init__(self) -> None:
        self._extras: dict[torch.device, Extras] = {}

    @abstractmethod
    def call_forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: TileCall
    ) -> tuple[Any, ...]:
        """All nine results; tensors `[b, h, s, d]`."""

    @abstractmethod
    def call_backward(
        self, tensors: tuple[torch.Tensor, ...], lse: torch.Tensor, extras: Extras, call: TileCall
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(dq, dk, dv) from tensors (dout, q, k, v, out), `[b, h, s, d]`."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: TileCall
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse, *_ = self.call_forward(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), call
        )
        b, s, h, _ = q.shape
        return out.transpose(1, 2), lse.reshape(b, h, s)

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
        extras = self.extras(q)
        # kernels read the LSE as dense memory, and give wrong numbers for a slice of it
        lse = lse.contiguous()
        if extras.lse_dims == 4:
            lse = lse.unsqueeze(-1)
        # a pass of its own where out and dout differ in strides: make both dense
        dout, out = dout.contiguous(), out.contiguous()
        tensors = tuple(t.transpose(1, 2) for t in (dout, q, k, v, out))
        dq, dk, dv = self.call_backward(tensors, lse, extras, call)
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)

    def extras(self, like: torch.Tensor) -> Extras:
        """What a forward on the device of `like` returns besides its results (asked once)."""
        known = self._extras.get(like.device)
        if known is None:
            tiny = like.new_zeros((1, 1, 64, 64))
            results = self.call_forward(tiny, tiny, tiny, TileCall(0.125, False, False))
            _, lse, cum_q, cum_k, _, _, seed, offset, _ = results
            known = self._extras[like.device] = Extras(cum_q, cum_k, seed, offset, lse.dim())
        return known
