# SPDX-License-Identifier: Apache-2.0
"""What all stand-ins compute, and what they insist on."""

from __future__ import annotations

from typing import NamedTuple

import torch

from megatron_seqpar.attention.kernels import TileCall
from megatron_seqpar.attention.kernels.reference import ReferenceAttention

_reference = ReferenceAttention()


class Asked(NamedTuple):
    """What a kernel was told: the arguments of every package that are not tensors.

    `left` and `right` count from the diagonal that ends in the last query and key, None: no limit.
    """

    scale: float | None
    left: int | None = None
    right: int | None = None
    softcap: float = 0.0

    def call(self, sq: int, skv: int) -> TileCall:
        """The same in a tile's own positions."""
        assert self.scale is not None, "the scale was not passed on"
        low = None if self.left is None else skv - sq - self.left
        high = None if self.right is None else skv - sq + self.right
        return TileCall(self.scale, low, high, self.softcap)


def top_left(scale: float | None, causal: bool, sq: int, skv: int) -> Asked:
    """Operators without windows, whose diagonal starts in the first query and key."""
    assert not causal or sq == skv, "causal is for squares"
    return Asked(scale, right=0 if causal else None)


def flash2(
    scale: float | None, causal: bool, left: int, right: int, softcap: float, sq: int, skv: int
) -> Asked:
    """Window sizes as FlashAttention 2 (and its copy in torch) makes sense of them.

    Its `mha_fwd` and `mha_bwd` first drop windows of `skv` keys and more, and then give a side
    without limit a window of `skv` keys where the other side has one.
    """
    left, right = (-1 if window >= skv else window for window in (left, right))
    if causal:
        right = 0
    if left < 0 and right < 0:
        return Asked(scale, softcap=softcap)
    left, right = (skv if window < 0 else window for window in (left, right))
    return Asked(scale, left, right, softcap)


def flash3(
    scale: float | None, causal: bool, left: int, right: int, softcap: float, sq: int, skv: int
) -> Asked:
    """Window sizes as FlashAttention 3 makes sense of them."""
    left = -1 if left >= skv - 1 else left
    right = -1 if right >= sq - 1 else right
    if causal:
        right = 0
    return Asked(scale, *(None if window < 0 else window for window in (left, right)), softcap)


def flash4(
    scale: float | None, causal: bool, left: int | None, right: int | None, softcap: float
) -> Asked:
    """Window sizes as FlashAttention 4 makes sense of them: None for no limit, never below 0."""
    assert left is None or left >= 0
    assert right is None or right >= 0
    return Asked(scale, left, 0 if causal else right, softcap)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, asked: Asked
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse); tensors `[b, s, h, d]`."""
    insist_on_dense_heads(q, k, v)
    return _reference.forward(q, k, v, asked.call(q.shape[1], k.shape[1]))


def backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    asked: Asked,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv); tensors `[b, s, h, d]`."""
    insist_on_dense_heads(dout, q, k, v, out)
    b, s, h, _ = q.shape
    assert lse.shape == (b, h, s)
    assert lse.dtype == torch.float32
    assert lse.is_contiguous(), "the kernel reads the LSE as dense memory"
    return _reference.backward(dout, q, k, v, out, lse, asked.call(q.shape[1], k.shape[1]))


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
