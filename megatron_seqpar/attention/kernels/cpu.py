# SPDX-License-Identifier: Apache-2.0
"""CPU flash attention from torch: the operator behind `scaled_dot_product_attention`, with its LSE.

It takes `[b, h, s, d]` with any strides, fp16 to fp64, grouped KV heads, and skips blocks above the
diagonal when causal. Its log-sum-exp is fp32 (fp64 for fp64).
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
    """See `base.Kernel`."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: TileCall
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = _forward(
            *(t.transpose(1, 2) for t in (q, k, v)), 0.0, call.causal, scale=call.scale
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
        grads = _backward(
            *(t.transpose(1, 2) for t in (dout, q, k, v, out)),
            lse,
            0.0,
            call.causal,
            scale=call.scale,
        )
        dq, dk, dv = (grad.transpose(1, 2) for grad in grads)
        return dq, dk, dv
