# SPDX-License-Identifier: Apache-2.0
"""State-space layers see tokens in order already.

Stock Mamba and gated-delta-net layers gather the sequence over the context-parallel group and
put the paired chunks back in order before the scan. Contiguous chunks are in order after the
gather, so both directions are the identity, for packed batches too: there Mamba's state starts
again in every document by `PackedSeqParams.seq_idx`, which numbers the tokens of the whole
sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_seqpar.errors import UnsupportedError
from megatron_seqpar.integration import state


def wrap_load_balancing(original: Callable[..., Any]) -> Callable[..., Any]:
    """Patch for `mamba_context_parallel._undo/_redo_attention_load_balancing`.

    Both take and return `[s, b, h]` with the whole sequence.
    """

    def attention_load_balancing(
        input_: torch.Tensor, cp_size: int, packed_seq_params: Any = None
    ) -> torch.Tensor:
        if not state.contiguous() or cp_size == 1:
            return original(input_, cp_size, packed_seq_params)
        if packed_seq_params is not None and getattr(packed_seq_params, "seq_idx", None) is None:
            raise UnsupportedError(
                f"packed_seq_params without seq_idx with --sequence-parallel-size {cp_size}: the "
                "state of a state-space layer would flow from document to document. Make "
                "PackedSeqParams with total_tokens, as pretrain_hybrid.py does (megatron-core 0.16 "
                "has none)."
            )
        return input_

    return attention_load_balancing
