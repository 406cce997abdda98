# SPDX-License-Identifier: Apache-2.0
"""One tile of attention by the book: autograd through a matrix of scores, band and soft-cap."""

from __future__ import annotations

import torch

from megatron_seqpar.attention.kernels import Kernel, TileCall
from tests.support.truth import Attention, Inputs


def tile_inputs(
    b: int,
    sq: int,
    skv: int,
    heads: tuple[int, int],
    d: int,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    dv: int | None = None,
) -> Inputs:
    """Random q `[b, sq, h, d]`, k `[b, skv, hkv, d]`, v `[b, skv, hkv, dv]`, dout, by `heads`."""
    generator = torch.Generator().manual_seed(seed)
    (h, hkv), dv = heads, d if dv is None else dv

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)

    shapes = (b, sq, h, d), (b, skv, hkv, d), (b, skv, hkv, dv), (b, sq, h, dv)
    return Inputs(*(normal(*shape) for shape in shapes))


def visible(sq: int, skv: int, call: TileCall) -> torch.Tensor:
    """The band as a matrix `[sq, skv]`."""
    difference = torch.arange(skv)[None] - torch.arange(sq)[:, None]
    seen = torch.ones(sq, skv, dtype=torch.bool)
    if call.low is not None:
        seen &= difference >= call.low
    if call.high is not None:
        seen &= difference <= call.high
    return seen


def plain(data: Inputs, call: TileCall) -> Attention:
    """The tile in the inputs' own dtype and on their device: the error that the dtype brings."""
    leaves = [t.detach().clone().requires_grad_() for t in data[:3]]
    q, k, v = leaves
    group = q.shape[2] // k.shape[2]
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(group, 2)) * call.scale
    if call.softcap:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    hidden = ~visible(q.shape[1], k.shape[1], call).to(q.device)
    scores = scores.masked_fill(hidden, float("-inf"))
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.repeat_interleave(group, 2))
    grads = torch.autograd.grad(out, leaves, data.dout)
    return Attention(out.detach(), scores.logsumexp(-1).detach(), *grads)


def truth(data: Inputs, call: TileCall) -> Attention:
    """The tile in fp64, on the CPU."""
    return plain(Inputs(*(t.cpu().double() for t in data)), call)


def run(kernel: Kernel, data: Inputs, call: TileCall) -> Attention:
    """Forward and backward of one tile."""
    out, lse = kernel.forward(data.q, data.k, data.v, call)
    return Attention(out, lse, *kernel.backward(data.dout, *data[:3], out, lse, call))


def assert_close_as(
    got: Attention, baseline: Attention, exact: Attention, ratio: float = 2.0
) -> None:
    """Our rms error is at most `ratio` times that of `baseline`, field by field."""
    for name, ours, theirs, right in zip(Attention._fields, got, baseline, exact, strict=True):
        right = right.to(ours.device)
        error = (ours.double() - right).square().mean().sqrt().item()
        allowed = (theirs.double() - right).square().mean().sqrt().item()
        assert error <= ratio * allowed + 1e-7, f"{name}: {error:.3e} over {ratio} x {allowed:.3e}"
