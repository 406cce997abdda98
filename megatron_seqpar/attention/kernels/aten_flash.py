# SPDX-License-Identifier: Apache-2.0
"""FlashAttention 2 as built into torch: always there on a CUDA build, GQA native."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from .aten_ops import FORWARD_RESULTS, GRADIENTS, AtenAttention, Extras
from .base import TileCall
from .installed import no_gpu, schema_differs

_forward = torch.ops.aten._scaled_dot_product_flash_attention
_backward = torch.ops.aten._scaled_dot_product_flash_attention_backward

_FORWARD = ("query", "key", "value", "dropout_p", "is_causal", "return_debug_mask", "scale")
_BACKWARD = (
    "grad_out", "query", "key", "value", "out", "logsumexp", "cum_seq_q", "cum_seq_k", "max_q",
    "max_k", "dropout_p", "is_causal", "philox_seed", "philox_offset", "scale",
)  # fmt: skip


def unavailable() -> str | None:
    """Why torch's flash attention cannot be used here, or None."""
    reason = no_gpu()
    if reason is None and not torch.backends.cuda.is_flash_attention_available():
        reason = "torch is built without flash attention"
    reason = reason or schema_differs(_forward.default, _FORWARD, FORWARD_RESULTS)
    return reason or schema_differs(_backward.default, _BACKWARD, GRADIENTS)


class AtenFlashAttention(AtenAttention):
    """See `base.Kernel`."""

    def call_forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: TileCall
    ) -> tuple[Any, ...]:
        return _forward.default(q, k, v, 0.0, call.causal, False, scale=call.scale)

    def call_backward(
        self, tensors: tuple[torch.Tensor, ...], lse: torch.Tensor, extras: Extras, call: TileCall
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        dout, q, k, v, out = tensors
        with _deterministic() if call.deterministic else nullcontext():
            return _backward.default(
                dout, q, k, v, out, lse, extras.cum_seq_q, extras.cum_seq_k, q.shape[2],
                k.shape[2], 0.0, call.causal, extras.seed, extras.offset, scale=call.scale,
            )  # fmt: skip


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
