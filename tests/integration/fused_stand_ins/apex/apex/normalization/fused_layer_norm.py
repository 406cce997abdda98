# SPDX-License-Identifier: Apache-2.0
"""Apex's fused LayerNorm as an autograd function in plain torch; `calls` counts both passes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

calls: Counter[str] = Counter()


class FusedLayerNormAffineFunction(torch.autograd.Function):
    """LayerNorm over the last dims, with weight and bias."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, shape: Any,
        eps: float, memory_efficient: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        calls["forward"] += 1
        ctx.save_for_backward(hidden, weight, bias)
        ctx.shape, ctx.eps = shape, eps
        return torch.nn.functional.layer_norm(hidden, shape, weight, bias, eps)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        calls["backward"] += 1
        given = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        with torch.enable_grad():
            out = torch.nn.functional.layer_norm(given[0], ctx.shape, *given[1:], ctx.eps)
        return (*torch.autograd.grad(out, given, gradient), None, None, None)
