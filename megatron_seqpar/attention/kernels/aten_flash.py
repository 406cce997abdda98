# SPDX-License-Identifier: Apache-2.0
"""FlashAttention 2 as built into torch: always there on a CUDA build, GQA native.

The operators below `scaled_dot_product_attention` are called, for they alone take windows. They
work on `[b, s, h, d]` and read windows of tall tiles as flash-attn 2 does (`bands.not_tall`).

Backward wants the random state that autograd would hand over from *its* forward. Here the output
and LSE come from all keys of the row, and a rank may run a backward whose forward another rank ran,
so the (unused, dropout is 0) state is taken from one tiny forward of the same operator: its dtype
and shape differ between releases, and are thus never guessed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from .base import TileCall
from .installed import no_gpu, schema_differs

_forward = torch.ops.aten._flash_attention_forward
_backward = torch.ops.aten._flash_attention_backward

_COMMON = (
    "query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal",
    "scale", "window_size_left", "window_size_right",
)  # fmt: skip
_FORWARD = (*_COMMON, "return_debug_mask")
_FORWARD_RESULTS = 5  # out, lse, two of random state, debug mask
_BACKWARD = (*_COMMON, "grad_out", "out", "logsumexp")
_GRADIENTS = 3


def unavailable() -> str | None:
    """Why torch's flash attention cannot be used here, or None."""
    reason = no_gpu()
    if reason is None and not torch.backends.cuda.is_flash_attention_available():
        reason = "torch is built without flash attention"
    reason = reason or schema_differs(_forward.default, _FORWARD, _FORWARD_RESULTS)
    return reason or schema_differs(_backward.default, _BACKWARD, _GRADIENTS)


class AtenFlashAttention:
    """See `base.Kernel`."""

    def __init__(self) -> None:
        self._states: dict[torch.device, tuple[Any, Any]] = {}

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: TileCall
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse, *_ = self._call_forward(q, k, v, call)
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
        # the kernel reads the LSE as dense memory, and gives wrong numbers for a slice of it
        dense = (dout.contiguous(), q, k, v, out.contiguous(), lse.contiguous())
        sq, skv = q.shape[1], k.shape[1]
        causal, left, right = call.causal_or_windows(sq, skv)
        with _deterministic() if call.deterministic else nullcontext():
            dq, dk, dv = _backward.default(
                *dense, None, None, sq, skv, 0.0, causal, *self._random_state(q),
                scale=call.scale, window_size_left=left, window_size_right=right,
            )  # fmt: skip
        return dq, dk, dv

    def _call_forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: TileCall
    ) -> tuple[Any, ...]:
        sq, skv = q.shape[1], k.shape[1]
        causal, left, right = call.causal_or_windows(sq, skv)
        results: tuple[Any, ...] = _forward.default(
            q, k, v, None, None, sq, skv, 0.0, causal, False,
            scale=call.scale, window_size_left=left, window_size_right=right,
        )  # fmt: skip
        return results

    def _random_state(self, like: torch.Tensor) -> tuple[Any, Any]:
        """What a forward on the device of `like` returns for backward (asked once)."""
        known = self._states.get(like.device)
        if known is None:
            tiny = like.new_zeros((1, 64, 1, 64))
            results = self._call_forward(tiny, tiny, tiny, TileCall(0.125))
            known = self._states[like.device] = results[2], results[3]
        return known


_switch = threading.Lock()


@contextmanager
def _deterministic() -> Iterator[None]:
    """Set torch's global switch, the only way to ask this operator for repeatable gradients."""
    with _switch:
        on = torch.are_deterministic_algorithms_enabled()
        warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(on, warn_only=warn_only)
