# SPDX-License-Identifier: Apache-2.0
"""FlashAttention 4 (package flash-attn-4, CuTe): Hopper and data-centre Blackwell, GQA native.

Written for 4.0 from beta 9 on (read to beta 36), whose backward is the first to heed the soft-cap.
Forward returns (out, lse) and, in later betas, more; gradients are written into tensors given to
backward, whose results differ as well.
"""

from __future__ import annotations

from typing import Any

import torch

from .base import TileCall
from .installed import import_or_reason, missing_parameters, no_gpu, wrong_version

_MODULE = "flash_attn.cute.interface"
_COMMON = (
    "q", "k", "v", "softmax_scale", "causal", "softcap", "window_size_left", "window_size_right",
)  # fmt: skip
_FORWARD = (*_COMMON, "return_lse")
_BACKWARD = (*_COMMON, "out", "dout", "lse", "deterministic", "dq", "dk", "dv")


def unavailable() -> str | None:
    """Why flash-attn 4 cannot be used here, or None."""
    reason = no_gpu() or wrong_version("flash-attn-4", "4.0.0b9", "4.1")
    return reason or _check_functions()


def _check_functions() -> str | None:
    module, reason = import_or_reason(_MODULE)
    if module is None:
        return reason
    reason = missing_parameters(module._flash_attn_fwd, _FORWARD)
    return reason or missing_parameters(module._flash_attn_bwd, _BACKWARD)


class FlashAttention4:
    """See `base.Kernel`."""

    def __init__(self) -> None:
        module, reason = import_or_reason(_MODULE)
        if module is None:
            raise ImportError(reason)
        self._forward, self._backward = module._flash_attn_fwd, module._flash_attn_bwd

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: TileCall
    ) -> tuple[torch.Tensor, torch.Tensor]:
        results = self._forward(q, k, v, return_lse=True, **_options(q, k, call))
        return results[0], results[1]

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
            q=q,
            k=k,
            v=v,
            out=out,
            dout=dout,
            lse=lse.contiguous(),
            deterministic=call.deterministic,
            dq=dq,
            dk=dk,
            dv=dv,
            **_options(q, k, call),
        )
        return dq, dk, dv


def _options(q: torch.Tensor, k: torch.Tensor, call: TileCall) -> dict[str, Any]:
    """Arguments that both passes share; here a window without limit is None."""
    causal, left, right = call.causal_or_windows(q.shape[1], k.shape[1])
    return {
        "softmax_scale": call.scale,
        "causal": causal,
        "window_size_left": None if left < 0 else left,
        "window_size_right": None if right < 0 else right,
        "softcap": call.softcap,
    }
