# SPDX-License-Identifier: Apache-2.0
"""Single-device attention in fp64 with autograd's own gradients: what ours is held to."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Attention(NamedTuple):
    """Output `[b, s, h, d]`, lse `[b, h, s]`, and the gradients of q, k and v."""

    out: torch.Tensor
    lse: torch.Tensor
    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor


class Inputs(NamedTuple):
    """q `[b, s, h, d]`, k and v `[b, s, hkv, d]`, and the gradient of the output."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor


def inputs(
    b: int, s: int, h: int, hkv: int, d: int, dtype: torch.dtype = torch.float64, seed: int = 0
) -> Inputs:
    """Random inputs, the same for the same arguments."""
    generator = torch.Generator().manual_seed(seed)

    def normal(heads: int) -> torch.Tensor:
        return torch.randn(b, s, heads, d, dtype=torch.float64, generator=generator).to(dtype)

    return Inputs(normal(h), normal(hkv), normal(hkv), normal(h))


def attention(data: Inputs, *, causal: bool, scale: float | None = None) -> Attention:
    """The truth, computed in fp64 whatever the inputs' dtype."""
    q, k, v = (t.detach().double().requires_grad_() for t in data[:3])
    group = q.shape[2] // k.shape[2]
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(group, 2))
    scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        above = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(above, float("-inf"))
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.repeat_interleave(group, 2))
    out.backward(data.dout.double())
    assert q.grad is not None
    assert k.grad is not None
    assert v.grad is not None
    return Attention(out.detach(), scores.logsumexp(-1).detach(), q.grad, k.grad, v.grad)


def largest_difference(got: Attention, truth: Attention) -> dict[str, float]:
    """Largest absolute difference of each field."""
    return {
        name: (a.double() - b).abs().max().item()
        for name, a, b in zip(Attention._fields, got, truth, strict=True)
    }
