# SPDX-License-Identifier: Apache-2.0
"""CPU flash attention from torch: the operator behind `scaled_dot_product_attention`, with its LSE.

It takes `[b, h, s, d]` with any strides, fp16 to fp64, grouped KV heads, and skips blocks above the
diagonal when causal, a diagonal that begins in the first query and the first key. Its log-sum-exp
is fp32 (fp64 for fp64).

Its backward adds up the key and value gradients of a group of query heads in the input dtype, so in
half precision each group member is called for alone and they are added up in fp32.
"""

from __future__ import annotations

import torch

from .base import TileCall

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def unavailable() -> str | None:
    """Always there."""
    return None


class CpuFlashAttention:
    """See `base.Kernel`: full rectangles and causal squares."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: TileCall
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = _forward(
            *(t.transpose(1, 2) for t in (q, k, v)), 0.0, not call.full, scale=call.scale
        )
        return out.transpose(1, 2), lse

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
        group = q.shape[2] // k.shape[2]
        if group == 1 or q.dtype in (torch.float32, torch.float64):
            grads = _backward(
                *(t.transpose(1, 2) for t in (dout, q, k, v, out)),
                lse.contiguous(),
                0.0,
                not call.full,
                scale=call.scale,
            )
            dq, dk, dv = (grad.transpose(1, 2) for grad in grads)
            return dq, dk, dv
        dq = q.new_empty(q.shape)
        dk, dv = (t.new_zeros(t.shape, dtype=torch.float32) for t in (k, v))
        for member in range(group):
            heads = slice(member, None, group)  # one query head of every KV head
            part = self.backward(
                dout[:, :, heads], q[:, :, heads], k, v, out[:, :, heads], lse[:, heads], call
            )
            dq[:, :, heads] = part[0]
            dk += part[1]
            dv += part[2]
        return dq, dk.to(k.dtype), dv.to(v.dtype)
