# SPDX-License-Identifier: Apache-2.0
"""flash-attn-4: `flash_attn.cute.interface` (beta 36; beta 9 returned the first two values)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import arithmetic

deterministic_calls: list[bool] = []


def _flash_attn_fwd(
    q: torch.Tensor | None,
    k: torch.Tensor | None,
    v: torch.Tensor,
    qv: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    min_seqlen_k: int | None = None,
    page_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    softcap: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    learnable_sink: torch.Tensor | None = None,
    tile_mn: tuple[int, int] | None = None,
    mma_pv_is_rs: bool | None = None,
    intra_wg_overlap: bool | None = None,
    num_threads: int = 384,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    _arch: int | None = None,
    score_mod: Callable[..., object] | None = None,
    mask_mod: Callable[..., object] | None = None,
    block_sparse_tensors: object = None,
    return_lse: bool = False,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, ...]:
    assert q is not None
    assert k is not None
    asked = arithmetic.flash4(
        softmax_scale, causal, window_size_left, window_size_right, softcap or 0.0
    )
    result, sums = arithmetic.forward(q, k, v, asked)
    return result, sums if return_lse else None, None, None, None


def _flash_attn_bwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    dout: torch.Tensor,
    lse: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    softcap: float = 0.0,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    m_block_size: int = 64,
    n_block_size: int = 128,
    num_threads: int = 256,
    pack_gqa: bool = False,
    num_stages_Q: int = 2,
    num_stages_dO: int = 2,
    SdP_swapAB: bool = False,
    dKV_swapAB: bool = False,
    dQ_swapAB: bool = False,
    AtomLayoutMSdP: int = 2,
    AtomLayoutNdKV: int = 2,
    AtomLayoutMdQ: int = 2,
    V_in_regs: bool = False,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    deterministic: bool = False,
    dq: torch.Tensor | None = None,
    dk: torch.Tensor | None = None,
    dv: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, ...]:
    deterministic_calls.append(deterministic)
    asked = arithmetic.flash4(softmax_scale, causal, window_size_left, window_size_right, softcap)
    grads = arithmetic.backward(dout, q, k, v, out, lse, asked)
    arithmetic.write(grads, (dq, dk, dv))
    return dq, dk, dv
