# SPDX-License-Identifier: Apache-2.0
"""cuDNN's fused attention through torch's operator; GQA native, no deterministic backward."""

from __future__ import annotations

from typing import Any

import torch

from .aten_ops import FORWARD_RESULTS, GRADIENTS, AtenAttention, Extras
from .base import TileCall
from .installed import no_gpu, schema_differs
from .reference import ReferenceAttention

_forward = torch.ops.aten._scaled_dot_product_cudnn_attention
_backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
_OLDEST = 90000

_FORWARD = (
    "query", "key", "value", "attn_bias", "compute_log_sumexp", "dropout_p", "is_causal",
    "return_debug_mask", "scale",
)  # fmt: skip
_BACKWARD = (
    "grad_out", "query", "key", "value", "out", "logsumexp", "philox_seed", "philox_offset",
    "attn_bias", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal", "scale",
)  # fmt: skip


def unavailable() -> str | None:
    """Why cuDNN's attention cannot be used here, or None."""
    reason = no_gpu()
    if reason is None:
        version = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
        if version is None:
            reason = "torch has no cuDNN"
        elif version < _OLDEST:
            reason = f"cuDNN {version} is older than {_OLDEST}"
    reason = reason or schema_differs(_forward.default, _FORWARD, FORWARD_RESULTS)
    return reason or schema_differs(_backward.default, _BACKWARD, GRADIENTS)


class CudnnAttention(AtenAttention):
    """See `base.Kernel`."""

    def __init__(self) -> None:
        super().__init__()
        # cuDNN refuses a single key; such a tile is tiny
        self._single_key = ReferenceAttention()

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: TileCall
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if k.shape[1] == 1:
            return self._single_key.forward(q, k, v, call)
        return super().forward(q, k, v, call)

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
        if k.shape[1] == 1:
            return self._single_key.backward(dout, q, k, v, out, lse, call)
        return super().backward(dout, q, k, v, out, lse, call)

    def call_forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: TileCall
    ) -> tuple[Any, ...]:
        return _forward.default(q, k, v, None, True, 0.0, call.causal, False, scale=call.scale)

    def call_backward(
        self, tensors: tuple[torch.Tensor, ...], lse: torch.Tensor, extras: Extras, call: TileCall
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        dout, q, k, v, out = tensors
        return _backward.default(
            dout, q, k, v, out, lse, extras.seed, extras.offset, None, extras.cum_seq_q,
            extras.cum_seq_k, q.shape[2], k.shape[2], 0.0, call.causal, scale=call.scale,
        )  # fmt: skip
