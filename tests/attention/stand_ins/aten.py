# SPDX-License-Identifier: Apache-2.0
"""torch's fused GPU operators, with the argument order of their schemas, for CPU tensors."""

from __future__ import annotations

from typing import Any

import torch

from . import arithmetic


class Flash:
    """`_flash_attention_forward` and its backward, of torch 2.11."""

    deterministic_calls: list[bool]

    def __init__(self) -> None:
        self.deterministic_calls = []
        self.rng_state = torch.empty(2, dtype=torch.uint64)
        self.unused = torch.empty((), dtype=torch.uint64)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cum_seq_q: torch.Tensor | None,
        cum_seq_k: torch.Tensor | None,
        max_q: int,
        max_k: int,
        dropout_p: float,
        is_causal: bool,
        return_debug_mask: bool,
        *,
        scale: float | None = None,
        window_size_left: int | None = None,
        window_size_right: int | None = None,
        seqused_k: torch.Tensor | None = None,
        alibi_slopes: torch.Tensor | None = None,
    ) -> tuple[Any, ...]:
        assert (seqused_k, alibi_slopes, return_debug_mask) == (None, None, False)
        asked = self._asked(
            query, key, (cum_seq_q, cum_seq_k, max_q, max_k, dropout_p), scale, is_causal,
            window_size_left, window_size_right,
        )  # fmt: skip
        out, lse = arithmetic.forward(query, key, value, asked)
        return out, lse, self.rng_state, self.unused, out

    def backward(
        self,
        grad_out: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        logsumexp: torch.Tensor,
        cum_seq_q: torch.Tensor | None,
        cum_seq_k: torch.Tensor | None,
        max_q: int,
        max_k: int,
        dropout_p: float,
        is_causal: bool,
        rng_state: torch.Tensor,
        unused: torch.Tensor,
        *,
        scale: float | None = None,
        window_size_left: int | None = None,
        window_size_right: int | None = None,
    ) -> tuple[torch.Tensor, ...]:
        assert rng_state is self.rng_state
        assert unused is self.unused
        self.deterministic_calls.append(torch.are_deterministic_algorithms_enabled())
        asked = self._asked(
            query, key, (cum_seq_q, cum_seq_k, max_q, max_k, dropout_p), scale, is_causal,
            window_size_left, window_size_right,
        )  # fmt: skip
        return arithmetic.backward(grad_out, query, key, value, out, logsumexp, asked)

    def _asked(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        fixed: tuple[Any, ...],
        scale: float | None,
        causal: bool,
        left: int | None,
        right: int | None,
    ) -> arithmetic.Asked:
        sq, skv = query.shape[1], key.shape[1]
        assert fixed == (None, None, sq, skv, 0.0)
        windows = (-1 if window is None else window for window in (left, right))
        return arithmetic.flash2(scale, causal, *windows, 0.0, sq, skv)  # no soft-cap in torch


def _to_bshd(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.transpose(1, 2) for tensor in tensors)


class Cudnn:
    """`_scaled_dot_product_cudnn_attention` and its backward; the LSE has a fourth dim or not."""

    def __init__(self, lse_dims: int) -> None:
        self.lse_dims = lse_dims
        self.seed = torch.empty((), dtype=torch.int64)
        self.offset = torch.empty((), dtype=torch.int64)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_bias: torch.Tensor | None,
        compute_log_sumexp: bool,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        return_debug_mask: bool = False,
        *,
        scale: float | None = None,
    ) -> tuple[Any, ...]:
        assert key.shape[2] > 1, "cuDNN serves no single key"
        assert (attn_bias, compute_log_sumexp, dropout_p) == (None, True, 0.0)
        asked = arithmetic.top_left(scale, is_causal, query.shape[2], key.shape[2])
        out, lse = arithmetic.forward(*_to_bshd(query, key, value), asked)
        lse = lse.unsqueeze(-1) if self.lse_dims == 4 else lse
        sizes = query.shape[2], key.shape[2]
        return out.transpose(1, 2), lse, None, None, *sizes, self.seed, self.offset, None

    def backward(
        self,
        grad_out: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        logsumexp: torch.Tensor,
        philox_seed: torch.Tensor,
        philox_offset: torch.Tensor,
        attn_bias: torch.Tensor | None,
        cum_seq_q: torch.Tensor | None,
        cum_seq_k: torch.Tensor | None,
        max_q: int,
        max_k: int,
        dropout_p: float,
        is_causal: bool,
        *,
        scale: float | None = None,
    ) -> tuple[torch.Tensor, ...]:
        assert key.shape[2] > 1, "cuDNN serves no single key"
        assert (attn_bias, cum_seq_q, cum_seq_k, dropout_p) == (None, None, None, 0.0)
        assert (max_q, max_k) == (query.shape[2], key.shape[2])
        assert philox_seed is self.seed
        assert philox_offset is self.offset
        assert logsumexp.dim() == self.lse_dims
        lse = logsumexp.squeeze(-1) if self.lse_dims == 4 else logsumexp
        tensors = _to_bshd(grad_out, query, key, value, out)
        asked = arithmetic.top_left(scale, is_causal, query.shape[2], key.shape[2])
        return _to_bshd(*arithmetic.backward(*tensors, lse, asked))
