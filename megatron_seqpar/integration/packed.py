# SPDX-License-Identifier: Apache-2.0
"""Packed (THD) batches: documents laid end to end in one sequence, split into contiguous chunks.

Megatron describes a packed micro-batch by a `PackedSeqParams`: ends of the documents in the whole
sequence, the same on every rank. Stock context parallelism pairs chunks inside every document and
wants each padded to a multiple of 2 P tokens. On our axis group rank r owns tokens
[r * n, (r + 1) * n) of the whole, wherever documents begin and end; one that crosses chunks goes on
in the next rank, and only the whole length must be divisible by P.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from megatron_seqpar.attention import Mask
from megatron_seqpar.errors import UnsupportedError
from megatron_seqpar.integration import documents, state

_ENDS = "_seqpar_ends"
"""Attribute of a `PackedSeqParams` that keeps what `ends` read from the device."""


def cu_seqlens(params: Any) -> torch.Tensor:
    """Where documents lie in the token dim: int32 `[n + 1]`, 0 and the ends with their padding."""
    padded: torch.Tensor | None = params.cu_seqlens_q_padded
    return params.cu_seqlens_q if padded is None else padded


def check(params: Any, context: str) -> None:
    """Refuse a `PackedSeqParams` that is not one packed self-attention sequence over our axis.

    context: what turned our attention on. Raises `UnsupportedError`.
    """
    if params.qkv_format != "thd":
        raise UnsupportedError(
            f"packed_seq_params.qkv_format {params.qkv_format} with {context}: documents are laid "
            "end to end; use thd."
        )
    if any(getattr(params, name, None) is not None for name in ("local_cp_size", "cp_group")):
        raise UnsupportedError(
            f"packed_seq_params with a context-parallel group of its own with {context}: the axis "
            "has one fixed size. Drop --hybrid-context-parallel."
        )
    if state.active() and not state.contiguous():
        raise UnsupportedError(
            f"packed_seq_params with --seqpar-token-layout {state.config().token_layout}: packed "
            "samples are cut into contiguous chunks only. Use --seqpar-token-layout contiguous."
        )


def ends(params: Any) -> tuple[int, ...]:
    """0 and the documents' ends, read from the device once for each `PackedSeqParams`.

    Where a document is followed by padding, the padding is a document of its own: it is seen by
    nothing that counts.
    """
    known: tuple[int, ...] | None = getattr(params, _ENDS, None)
    if known is not None:
        return known
    places = cu_seqlens(params).tolist()
    if params.cu_seqlens_q_padded is not None:
        sizes = params.cu_seqlens_q.diff().tolist()
        filled = zip(places, sizes, places[1:], strict=False)
        places = [0, *(end for start, size, stop in filled for end in (start + size, stop))]
    known = tuple(places)
    setattr(params, _ENDS, known)
    return known


def mask_of(inner: Mask, params: Any, seq_length: int) -> Mask:
    """`inner` inside each document of a packed sequence of `seq_length` tokens in all."""
    return documents.within(inner, ends(params), seq_length)


def _own(count: int, rank: int, like: torch.Tensor) -> torch.Tensor:
    """The positions in the whole sequence of the `count` tokens of group rank `rank`."""
    return torch.arange(rank * count, (rank + 1) * count, device=like.device, dtype=like.dtype)


def positions(cumulative: torch.Tensor, count: int, rank: int) -> torch.Tensor:
    """The place of each of a rank's tokens inside its document, int `[count]`.

    cumulative: `[n + 1]`, 0 and the documents' ends in the whole sequence; nothing is read from
        the device. count: tokens a rank. Tokens behind the last end get 0.
    """
    own = _own(count, rank, cumulative)
    starts = cumulative[torch.searchsorted(cumulative, own, right=True) - 1]
    return torch.where(behind(cumulative, count, rank), 0, own - starts)


def behind(cumulative: torch.Tensor, count: int, rank: int) -> torch.Tensor:
    """Which of a rank's tokens lie behind the last document, bool `[count]`; as `positions`."""
    return _own(count, rank, cumulative) >= cumulative[-1]


def ends_document(cumulative: torch.Tensor, count: int, rank: int) -> torch.Tensor:
    """Which of a rank's tokens are the last of their document, bool `[count]`; as `positions`."""
    own = _own(count, rank, cumulative)
    here = torch.searchsorted(cumulative, own, right=True)
    following = torch.searchsorted(cumulative, own + 1, right=True)
    return here != following


def wrap_dataset_config_post_init(original: Callable[..., None]) -> Callable[..., None]:
    """Patch for `GPTDatasetConfig.__post_init__`: no padding of documents for paired chunks.

    The SFT dataset pads every conversation to a multiple of twice this size.
    """

    @functools.wraps(original)
    def __post_init__(self: Any) -> None:
        original(self)
        if state.active():
            self.context_parallel_size = 1

    return __post_init__
