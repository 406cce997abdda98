# SPDX-License-Identifier: Apache-2.0
"""cuDNN's fused attention through torch's operator; GQA native, no deterministic backward.

It works on `[b, h, s, d]` with any strides whose last is 1, and returns nine values: (out, lse,
cum_seq_q, cum_seq_k, max_q, max_k, seed, offset, debug mask). Its backward wants four of these
again: what autograd would hand over from *its* forward. Here the output and LSE come from all keys
of the row, and a rank may run a backward whose forward another rank ran, so the rest is taken from
one tiny forward of the same operator: dtypes and shapes of the (unused, dropout is 0) random state
and the number of dims of the LSE differ between releases, and are thus never guessed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .base import TileCall
from .installed import no_gpu, schema_differs
from .reference import ReferenceAttention

_forward = torch.ops.aten._scaled_dot_product_cudnn_attention
_backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
_OLDEST = 90000
_FORWARD_RESULTS = 9
_GRADIENTS = 3

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
    reason = reason or schema_differs(_forward.default, _FORWARD, _FORWARD_RESULTS)
    return reason or schema_differs(_backward.default, _BACKWARD, _GRADIENTS)


class Extras(NamedTuple):
    """What backward wants besides tensors of the tile."""

    cum_seq_q: torch.Tensor | None
    cum_seq_k: torch.Tensor | None
    seed: torch.Tensor
    offset: torch.Tensor
    lse_dims: int


class CudnnAttention:
    """See `base.Kernel`: full rectangles and causal squares."""

    def __init__(self) -> None:
        self._extras: dict[torch.device, Extras] = {}
        # cuDNN refuses a single key; such a tile is tiny
        self._single_key = ReferenceAttention()

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: TileCall
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if k.shape[1] == 1:
            return self._single_key.forward(q, k, v, call)
        out, lse, *_ = self._call_forward(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), call
        )
        b, s, h, _ = q.shape
        return out.transpose(1, 2), lse.reshape(b, h, s)

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
        extras = self._get_extras(q)
        # the kernel reads the LSE as dense memory, and gives wrong numbers for a slice of it
        lse = lse.contiguous()
        if extras.lse_dims == 4:
            lse = lse.unsqueeze(-1)
        # a pass of its own where out and dout differ in strides: make both dense
        dout, out = dout.contiguous(), out.contiguous()
        grads = _backward.default(
            *(t.transpose(1, 2) for t in (dout, q, k, v, out)), lse, extras.seed, extras.offset,
            None, extras.cum_seq_q, extras.cum_seq_k, q.shape[1], k.shape[1], 0.0, not call.full,
            scale=call.scale,
        )  # fmt: skip
        dq, dk, dv = (grad.transpose(1, 2) for grad in grads)
        return dq, dk, dv

    def _call_forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: TileCall
    ) -> tuple[Any, ...]:
        """All nine results; tensors `[b, h, s, d]`."""
        results: tuple[Any, ...] = _forward.default(
            q, k, v, None, True, 0.0, not call.full, False, scale=call.scale
        )
        return results

    def _get_extras(self, like: torch.Tensor) -> Extras:
        """What a forward on the device of `like` returns besides its results (asked once)."""
        known = self._extras.get(like.device)
        if known is None:
            tiny = like.new_zeros((1, 1, 64, 64))
            results = self._call_forward(tiny, tiny, tiny, TileCall(0.125))
            _, lse, cum_q, cum_k, _, _, seed, offset, _ = results
            known = self._extras[like.device] = Extras(cum_q, cum_k, seed, offset, lse.dim())
        return known
