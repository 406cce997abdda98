# SPDX-License-Identifier: Apache-2.0
"""Attention by the book with autograd's gradients: truth in fp64, yardstick in low precision.

A result passes when its error is at most twice the error that plain attention makes in the same
dtype: that much the dtype itself costs.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from megatron_seqpar.attention.masks import Region

LIMIT = 2.0
FLOOR = 1e-7  # errors below it are rounding, whatever the yardstick's


class Inputs(NamedTuple):
    """q `[b, sq, h, dk]`, k `[b, skv, hkv, dk]`, v `[b, skv, hkv, dv]`, dout `[b, sq, h, dv]`."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor


class Results(NamedTuple):
    """out as dout, lse `[b, h, sq]`, and the gradients of q, k and v."""

    out: torch.Tensor
    lse: torch.Tensor
    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor


class Shape(NamedTuple):
    """Sizes of a problem; `tokens` are (queries, keys)."""

    tokens: tuple[int, int]
    heads: int
    kv_heads: int
    dim: int
    value_dim: int
    batch: int = 1


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Inputs:
    """Normal numbers, the same for the same arguments."""
    generator = torch.Generator(device).manual_seed(seed)
    (sq, skv), b = shape.tokens, shape.batch

    def normal(tokens: int, heads: int, dim: int) -> torch.Tensor:
        size = (b, tokens, heads, dim)
        return torch.randn(size, generator=generator, device=device).to(dtype)

    return Inputs(
        normal(sq, shape.heads, shape.dim),
        normal(skv, shape.kv_heads, shape.dim),
        normal(skv, shape.kv_heads, shape.value_dim),
        normal(sq, shape.heads, shape.value_dim),
    )


def seen(
    regions: tuple[Region, ...], tokens: tuple[int, int], device: torch.device
) -> torch.Tensor:
    """Which query sees which key, `[sq, skv]`, pair by pair."""
    i = torch.arange(tokens[0], device=device)[:, None]
    j = torch.arange(tokens[1], device=device)[None, :]
    pairs = torch.zeros(tokens, dtype=torch.bool, device=device)
    for q, kv, low, high in regions:
        inside = (i >= q.start) & (i < q.stop) & (j >= kv.start) & (j < kv.stop)
        inside &= j - i >= (-tokens[0] - tokens[1] if low is None else low)
        inside &= j - i <= (tokens[0] + tokens[1] if high is None else high)
        pairs |= inside
    return pairs


def attention(
    data: Inputs, pairs: torch.Tensor, dtype: torch.dtype, scale: float, softcap: float = 0.0
) -> Results:
    """Attention computed in `dtype` throughout; every query must see a key."""
    leaves = [t.detach().to(dtype, copy=True).requires_grad_() for t in data[:3]]
    q, k, v = leaves
    group = q.shape[2] // k.shape[2]
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(group, 2)) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~pairs, -math.inf)
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.repeat_interleave(group, 2))
    grads = torch.autograd.grad(out, leaves, data.dout.to(dtype))
    return Results(out.detach(), scores.logsumexp(-1).detach(), *grads)


def error_ratios(got: Results, yardstick: Results, truth: Results) -> dict[str, float]:
    """The rms error of `got` over that of `yardstick`, by field; infinite where not finite."""
    ratios = {}
    for name, ours, theirs, exact in zip(Results._fields, got, yardstick, truth, strict=True):
        error, allowed = (_rms(t.double() - exact) for t in (ours, theirs))
        ratios[name] = error / max(allowed, FLOOR) if math.isfinite(error) else math.inf
    return ratios


def largest_difference(got: Results, truth: Results) -> float:
    """The largest absolute difference of any number; infinite where not finite."""
    found = [
        (ours.double() - exact).abs().max().item() for ours, exact in zip(got, truth, strict=True)
    ]
    return max(found) if all(map(math.isfinite, found)) else math.inf


def _rms(tensor: torch.Tensor) -> float:
    return tensor.square().mean().sqrt().item()
