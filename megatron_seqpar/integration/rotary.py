# SPDX-License-Identifier: Apache-2.0
"""Rotary embeddings of the contiguous tokens that a rank owns.

The stock function picks two separate pieces of the table, through a pinned index tensor that it
copies to the GPU. Ours is a view of one piece and works on any device.

In packed batches positions start again in every document. Stock code cuts the table for one
document after another, reading their lengths from the device; here one gather picks the row of
every token, and the rotation itself stays stock, fused or not.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megatron_seqpar.integration import packed, state
from megatron_seqpar.integration.batch import narrow


def wrap_get_pos_emb_on_this_cp_rank(original: Callable[..., Any]) -> Callable[..., Any]:
    """Patch for `rope_utils.get_pos_emb_on_this_cp_rank` and its by-name copies."""

    def get_pos_emb_on_this_cp_rank(
        pos_emb: torch.Tensor, seq_dim: int, cp_group: dist.ProcessGroup
    ) -> torch.Tensor:
        if not state.contiguous():
            return original(pos_emb, seq_dim, cp_group)
        return narrow(pos_emb, seq_dim, cp_group.rank(), cp_group.size())

    get_pos_emb_on_this_cp_rank.__doc__ = original.__doc__
    return get_pos_emb_on_this_cp_rank


def rows(freqs: torch.Tensor, cumulative: torch.Tensor, count: int, group: Any) -> torch.Tensor:
    """The rows of a rotary table that belong to this rank's tokens of a packed sequence.

    freqs: `[positions, 1, 1, d]`. cumulative: `[n + 1]`, 0 and the documents' ends. count: tokens
        a rank. Returns `[count, 1, 1, d]`.
    A table as long as the whole sequence has a row for each of its tokens, as in stock code.
    """
    if freqs.shape[0] == count * group.size():
        return narrow(freqs, 0, group.rank(), group.size())
    return freqs[packed.positions(cumulative, count, group.rank()).to(freqs.device)]


def wrap_apply_rotary_pos_emb(original: Callable[..., Any]) -> Callable[..., Any]:
    """Patch for `rope_utils.apply_rotary_pos_emb` and its by-name copies."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def apply_rotary_pos_emb(*args: Any, **kwargs: Any) -> torch.Tensor:
        bound = signature.bind(*args, **kwargs)
        arguments = bound.arguments
        cumulative = arguments.get("cu_seqlens")
        if cumulative is None or not state.contiguous():
            return original(*args, **kwargs)
        group = arguments.get("cp_group")
        if group is None:
            from megatron.core import parallel_state

            group = parallel_state.get_context_parallel_group()
        tokens = arguments["t"]
        arguments["t"] = tokens.unsqueeze(1)
        arguments["freqs"] = rows(arguments["freqs"], cumulative, tokens.shape[0], group)
        arguments["cu_seqlens"] = None
        rotated: torch.Tensor = original(*bound.args, **bound.kwargs)
        return rotated.squeeze(1)

    return apply_rotary_pos_emb
