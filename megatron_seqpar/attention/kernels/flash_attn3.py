# SPDX-License-Identifier: Apache-2.0
"""FlashAttention 3 (package flash_attn_3): Hopper, GQA native, keys and values may differ in dim.

Its Python functions changed their parameters without a change of version, so the operators below
them are called, by parameter name, after their schemas were checked. Gradients are written into
tensors given to backward: what else it returns differs between builds and is not looked at.
"""

from __future__ import annotations

from typing import Any

import torch

from .base import TileCall
from .installed import import_or_reason, no_gpu, schema_differs, wrong_version

_LIBRARY = "flash_attn_3._C"  # registers torch.ops.flash_attn_3
_COMMON = (
    "q", "k", "v", "softmax_scale", "is_causal", "window_size_left", "window_size_right", "softcap",
)  # fmt: skip
_FORWARD = (*_COMMON, "num_splits")
_BACKWARD = (*_COMMON, "dout", "out", "softmax_lse", "dq", "dk", "dv", "deterministic")
_FORWARD_RESULTS = 4  # out, lse, and two of split attention


def unavailable() -> str | None:
    """Why flash-attn 3 cannot be used here, or None."""
    reason = no_gpu() or wrong_version("flash_attn_3", "3.0.0b1", "3.1")
    if reason is None:
        _, reason = import_or_reason(_LIBRARY)
    return reason or _check_schemas()


def _check_schemas() -> str | None:
    ops = torch.ops.flash_attn_3
    if not (hasattr(ops, "fwd") and hasattr(ops, "bwd")):
        return "flash_attn_3 registers no operators fwd and bwd"
    reason = schema_differs(ops.fwd.default, _FORWARD, _FORWARD_RESULTS)
    return reason or schema_differs(ops.bwd.default, _BACKWARD)


class FlashAttention3:
    """See `base.Kernel`."""

    def __init__(self) -> None:
        self._forward = torch.ops.flash_attn_3.fwd.default
        self._backward = torch.ops.flash_attn_3.bwd.default

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: TileCall
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # one split: several would be merged by a second kernel, which long rows do not need
        out, lse, _, _ = self._forward(q, k, v, num_splits=1, **_options(q, k, call))
        return out, lse

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
        dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
        self._backward(
            *(t if t.stride(-1) == 1 else t.contiguous() for t in (dout, q, k, v, out)),
            lse.contiguous(),
            dq=dq,
            dk=dk,
            dv=dv,
            deterministic=call.deterministic,
            **_options(q, k, call),
        )
        return dq, dk, dv


def _options(q: torch.Tensor, k: torch.Tensor, call: TileCall) -> dict[str, Any]:
    """Arguments that both passes share."""
    causal, left, right = call.causal_or_windows(q.shape[1], k.shape[1])
    return {
        "softmax_scale": call.scale,
        "is_causal": causal,
        "window_size_left": left,
        "window_size_right": right,
        "softcap": call.softcap,
    }
