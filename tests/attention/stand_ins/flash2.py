# SPDX-License-Identifier: Apache-2.0
"""flash-attn 2.7 and 2.8: `flash_attn.flash_attn_interface`."""

from __future__ import annotations

import torch

from . import arithmetic

deterministic_calls: list[bool] = []


def _flash_attn_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    return_softmax: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    assert dropout_p == 0.0
    assert alibi_slopes is None
    assert return_softmax is False
    asked = arithmetic.flash2(
        softmax_scale, causal, window_size_left, window_size_right, softcap, q.shape[1], k.shape[1]
    )
    out, lse = arithmetic.forward(q, k, v, asked)
    return out, lse, q.new_empty(0), torch.empty(2, dtype=torch.int64)


def _flash_attn_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    dq: torch.Tensor | None,
    dk: torch.Tensor | None,
    dv: torch.Tensor | None,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    deterministic: bool,
    rng_state: torch.Tensor | None = None,
) -> torch.Tensor:
    assert dropout_p == 0.0
    assert alibi_slopes is None
    assert rng_state is None
    deterministic_calls.append(deterministic)
    asked = arithmetic.flash2(
        softmax_scale, causal, window_size_left, window_size_right, softcap, q.shape[1], k.shape[1]
    )
    grads = arithmetic.backward(dout, q, k, v, out, softmax_lse, asked)
    arithmetic.write(grads, (dq, dk, dv))
    return torch.empty_like(softmax_lse)
