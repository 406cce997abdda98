# SPDX-License-Identifier: Apache-2.0
"""Single-device attention in fp64 with autograd's own gradients: what ours is held to."""

from __future__ import annotations

from math import inf
from typing import NamedTuple

import torch

from megatron_seqpar.attention import Causal, Full, Mask


class Attention(NamedTuple):
    """Output `[b, s, h, dv]`, lse `[b, h, s]`, and the gradients of q, k and v."""

    out: torch.Tensor
    lse: torch.Tensor
    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor


class Inputs(NamedTuple):
    """q `[b, s, h, d]`, k `[b, s, hkv, d]`, v `[b, s, hkv, dv]`, and the output's gradient."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor


def inputs(
    b: int,
    s: int,
    h: int,
    hkv: int,
    d: int,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    dv: int | None = None,
) -> Inputs:
    """Random inputs, the same for the same arguments."""
    generator = torch.Generator().manual_seed(seed)

    def normal(heads: int, dim: int) -> torch.Tensor:
        return torch.randn(b, s, heads, dim, dtype=torch.float64, generator=generator).to(dtype)

    dv = d if dv is None else dv
    return Inputs(normal(h, d), normal(hkv, d), normal(hkv, dv), normal(h, dv))


def visible(mask: Mask, seq_length: int) -> torch.Tensor:
    """The mask as a matrix `[s, s]`, written out pair by pair from its regions' definition."""
    difference = torch.arange(seq_length)[None] - torch.arange(seq_length)[:, None]
    seen = torch.zeros(seq_length, seq_length, dtype=torch.bool)
    for region in mask.regions(seq_length):
        part = difference[slice(*region.q), slice(*region.kv)]
        inside = torch.ones_like(part, dtype=torch.bool)
        if region.low is not None:
            inside &= part >= region.low
        if region.high is not None:
            inside &= part <= region.high
        seen[slice(*region.q), slice(*region.kv)] |= inside
    return seen


def attention(
    data: Inputs,
    *,
    causal: bool | None = None,
    mask: Mask | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
) -> Attention:
    """The truth, computed in fp64 whatever the inputs' dtype; give `causal` or `mask`."""
    mask = mask or (Causal() if causal else Full())
    return with_sink(data, mask, None, scale=scale, softcap=softcap)[0]


def with_sink(
    data: Inputs,
    mask: Mask,
    sink: torch.Tensor | None,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
) -> tuple[Attention, torch.Tensor | None]:
    """The truth where every query also sees a key of score `sink[h]` and value zero; its gradient.

    A query that sees nothing at all has an output of 0.
    """
    q, k, v = (t.detach().double().requires_grad_() for t in data[:3])
    group = q.shape[2] // k.shape[2]
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(group, 2))
    scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible(mask, q.shape[1]), float("-inf"))
    offset = torch.full((q.shape[2],), float("-inf"), dtype=torch.float64)
    if sink is not None:
        offset = sink.detach().double().requires_grad_()
    every = torch.cat((scores, offset[None, :, None, None].expand(*scores.shape[:3], 1)), -1)
    lse = every.logsumexp(-1)
    shift = torch.where(lse.isinf(), torch.zeros_like(lse), lse)
    weights = torch.exp(scores - shift[..., None])
    out = torch.einsum("bhqk,bkhd->bqhd", weights, v.repeat_interleave(group, 2))
    out.backward(data.dout.double())
    assert q.grad is not None
    assert k.grad is not None
    assert v.grad is not None
    return Attention(out.detach(), lse.detach(), q.grad, k.grad, v.grad), offset.grad


def largest_difference(got: Attention, truth: Attention) -> dict[str, float]:
    """Largest absolute difference of each field; equal infinities do not differ.

    What is not a number differs infinitely: Python's `max` over fields would pass over a NaN.
    """
    return {
        name: torch.where(a == b, 0.0, (a.double() - b).abs()).nan_to_num(nan=inf).max().item()
        for name, a, b in zip(Attention._fields, got, truth, strict=True)
    }
