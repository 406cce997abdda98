# SPDX-License-Identifier: Apache-2.0
"""Head dims that a kernel does not serve as they are: pad with zeros, compute, cut.

Zeros appended to the head dim of queries and keys change no score, and zeros appended to values
only append zeros to the output, so the result is exact; what it costs is the work on the padding.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from .base import Kernel, TileCall


class PaddedHeads:
    """See `base.Kernel`: the kernel `inner`, called with every head dim padded to `dim`."""

    def __init__(self, inner: Kernel, dim: int) -> None:
        self.inner, self.dim = inner, dim

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: TileCall
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = self.inner.forward(self._wide(q), self._wide(k), self._wide(v), call)
        return out[..., : v.shape[-1]], lse

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
        wide_dout, wide_q, wide_k, wide_v, wide_out = map(self._wide, (dout, q, k, v, out))
        dq, dk, dv = self.inner.backward(wide_dout, wide_q, wide_k, wide_v, wide_out, lse, call)
        dim, value_dim = q.shape[-1], v.shape[-1]
        return dq[..., :dim], dk[..., :dim], dv[..., :value_dim]

    def _wide(self, tensor: torch.Tensor) -> torch.Tensor:
        missing = self.dim - tensor.shape[-1]
        return pad(tensor, (0, missing)) if missing else tensor
