# SPDX-License-Identifier: Apache-2.0
"""FlashAttention 2 (package flash-attn): Ampere and newer, GQA native.

Written for 2.7 and 2.8, whose `_flash_attn_forward` returns (out, lse, mask, rng state) and whose
`_flash_attn_backward` writes into the gradients it is given; 2.6 returned eight values. Windows of
tall tiles are read otherwise than written (`bands.not_tall`), and never reach it.
"""

from __future__ import annotations

from typing import Any

import torch

from .base import TileCall
from .installed import import_or_reason, missing_parameters, no_gpu, wrong_version

_MODULE = "flash_attn.flash_attn_interface"
_COMMON = (
    "q", "k", "v", "dropout_p", "softmax_scale", "causal", "window_size_left",
    "window_size_right", "softcap", "alibi_slopes",
)  # fmt: skip
_FORWARD = (*_COMMON, "return_softmax")
_BACKWARD = (*_COMMON, "dout", "out", "softmax_lse", "dq", "dk", "dv", "deterministic")


def unavailable() -> str | None:
    """Why flash-attn 2 cannot be used here, or None."""
    reason = no_gpu() or wrong_version("flash-attn", "2.7", "2.9")
    return reason or _check_functions()


def _check_functions() -> str | None:
    module, reason = import_or_reason(_MODULE)
    if module is None:
        return reason
    reason = missing_parameters(module._flash_attn_forward, _FORWARD)
    return reason or missing_parameters(module._flash_attn_backward, _BACKWARD)


class FlashAttention2:
    """See `base.Kernel`."""

    def __init__(self) -> None:
        module, reason = import_or_reason(_MODULE)
        if module is None:
            raise ImportError(reason)
        self._forward, self._backward = module._flash_attn_forward, module._flash_attn_backward

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: TileCall
    ) -> tuple[torch.Tensor, torch.Tensor]:
        options = _options(q, k, call)
        out, lse, _, _ = self._forward(q, k, v, return_softmax=False, **options)
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
            dout, q, k, v, out, lse.contiguous(), dq, dk, dv,
            deterministic=call.deterministic, **_options(q, k, call),
        )  # fmt: skip
        return dq, dk, dv


def _options(q: torch.Tensor, k: torch.Tensor, call: TileCall) -> dict[str, Any]:
    """Arguments that both passes share: no dropout, no ALiBi."""
    causal, left, right = call.causal_or_windows(q.shape[1], k.shape[1])
    return {
        "dropout_p": 0.0,
        "softmax_scale": call.scale,
        "causal": causal,
        "window_size_left": left,
        "window_size_right": right,
        "softcap": call.softcap,
        "alibi_slopes": None,
    }
