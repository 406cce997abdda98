# SPDX-License-Identifier: Apache-2.0
"""Rotary embeddings of the contiguous tokens that a rank owns.

The stock function picks two separate pieces of the table, through a pinned index tensor that it
copies to the GPU. Ours is a view of one piece and works on any device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megatron_seqpar.integration import state
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
