# SPDX-License-Identifier: Apache-2.0
"""What all stand-ins compute, and what they insist on."""

from __future__ import annotations

import torch

from megatron_seqpar.attention.kernels import TileCall
from megatron_seqpar.attention.kernels.reference import ReferenceAttention

_reference = ReferenceAttention()


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse); tensors `[b, s, h, d]`."""
    assert scale is not None, "the scale was not passed on"
    insist_on_dense_heads(q, k, v)
    return _reference.forward(q, k, v, TileCall(scale, causal, False))


def backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float | None,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv); tensors `[b, s, h, d]`."""
    assert scale is not None, "the scale was not passed on"
    insist_on_dense_heads(dout, q, k, v, out)
    b, s, h, _ = q.shape
    assert lse.shape == (b, h, s)
    assert lse.dtype == torch.float32
    assert lse.is_contiguous(), "the kernel reads the LSE as dense memory"
    return _reference.backward(dout, q, k, v, out, lse, TileCall(scale, causal, False))


def insist_on_dense_heads(*tensors: torch.Tensor) -> None:
    """The last dim of every tensor must be contiguous."""
    assert all(tensor.stride(-1) == 1 for tensor in tensors)


def write(grads: tuple[torch.Tensor, ...], into: tuple[torch.Tensor | None, ...]) -> None:
    """Write gradients in the tensors given for them."""
    for grad, target in zip(grads, into, strict=True):
        assert target is not None
        assert target.shape == grad.shape
        assert target.dtype == grad.dtype
        assert target.stride(-1) == 1
        target.copy_(grad)
