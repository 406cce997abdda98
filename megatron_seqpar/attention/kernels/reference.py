# SPDX-License-Identifier: Apache-2.0
"""Plain attention in fp64, for truth: every formula written out, O(sq * skv) memory.

Results are fp64 inside and leave in the input dtype; the LSE is fp32, fp64 for fp64 inputs.
"""

from __future__ import annotations

import torch

from ..merge import accumulate_dtype
from .base import TileCall


def unavailable() -> str | None:
    """Always there."""
    return None


class ReferenceAttention:
    """See `base.Kernel`."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: TileCall
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scores = _scores(q, k, call)
        lse = torch.logsumexp(scores, dim=-1)
        out = torch.einsum("bhqk,bkhd->bqhd", torch.exp(scores - lse[..., None]), _heads(v, q))
        return out.to(q.dtype), lse.to(accumulate_dtype(q.dtype))

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
        dout64 = dout.double()
        probabilities = torch.exp(_scores(q, k, call) - lse.double()[..., None])
        delta = torch.einsum("bqhd,bqhd->bhq", dout64, out.double())
        dprob = torch.einsum("bqhd,bkhd->bhqk", dout64, _heads(v, q))
        dscores = probabilities * (dprob - delta[..., None]) * call.scale
        dq = torch.einsum("bhqk,bkhd->bqhd", dscores, _heads(k, q))
        dk = torch.einsum("bhqk,bqhd->bkhd", dscores, q.double())
        dv = torch.einsum("bhqk,bqhd->bkhd", probabilities, dout64)
        return dq.to(q.dtype), _group(dk, k).to(k.dtype), _group(dv, v).to(v.dtype)


def _heads(x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Repeat KV heads to one per query head, in fp64."""
    return x.double().repeat_interleave(q.shape[2] // x.shape[2], dim=2)


def _group(grad: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Sum gradients of repeated KV heads back to the KV heads of `like`."""
    b, s, _, d = grad.shape
    return grad.view(b, s, like.shape[2], -1, d).sum(3)


def _scores(q: torch.Tensor, k: torch.Tensor, call: TileCall) -> torch.Tensor:
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), _heads(k, q)) * call.scale
    if call.causal:
        above = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(above, float("-inf"))
    return scores
