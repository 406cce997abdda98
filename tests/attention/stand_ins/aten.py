# SPDX-License-Identifier: Apache-2.0
"""torch's two fused GPU operators, with the argument order of their schemas, for CPU tensors."""

from __future__ import annotations

from typing import Any

import torch

from . import arithmetic


def _to_bshd(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.transpose(1, 2) for tensor in tensors)


class Flash:
    """`_scaled_dot_product_flash_attention` and its backward."""

    deterministic_calls: list[bool]

    def __init__(self) -> None:
        self.deterministic_calls = []
        self.seed = torch.empty(2, dtype=torch.uint64)
        self.offset = torch.empty((), dtype=torch.uint64)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        return_debug_mask: bool = False,
        *,
        scale: float | None = None,
    ) -> tuple[Any, ...]:
        assert dropout_p == 0.0
        out, lse = arithmetic.forward(*_to_bshd(query, key, value), scale, is_causal)
        sizes = query.shape[2], key.shape[2]
        return out.transpose(1, 2), lse, None, None, *sizes, self.seed, self.offset, out

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
        philox_seed: torch.Tensor,
        philox_offset: torch.Tensor,
        *,
        scale: float | None = None,
    ) -> tuple[torch.Tensor, ...]:
        assert (cum_seq_q, cum_seq_k, dropout_p) == (None, None, 0.0)
        assert (max_q, max_k) == (query.shape[2], key.shape[2])
        assert philox_seed is self.seed
        assert philox_offset is self.offset
        self.deterministic_calls.append(torch.are_deterministic_algorithms_enabled())
        tensors = _to_bshd(grad_out, query, key, value, out)
        return _to_bshd(*arithmetic.backward(*tensors, logsumexp, scale, is_causal))


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
        out, lse = arithmetic.forward(*_to_bshd(query, key, value), scale, is_causal)
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
        return _to_bshd(*arithmetic.backward(*tensors, lse, scale, is_causal))
