# SPDX-License-Identifier: Apache-2.0
"""Give each rank the contiguous tokens it owns.

Stock Megatron cuts a batch into 2 x CP pieces and pairs an early with a late one. On our axis
group rank r owns tokens [r * n, (r + 1) * n) of each sequence, n = length / P. With the zigzag
token layout stock code cuts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megatron_seqpar.errors import UnsupportedError
from megatron_seqpar.integration import documents, state

METADATA = frozenset(
    {"cu_seqlens", "cu_seqlens_padded", "max_seqlen", "local_cp_size", "hybrid_cp_group"}
)
"""Batch entries without a sequence dimension."""


def narrow(tensor: torch.Tensor, dim: int, rank: int, size: int) -> torch.Tensor:
    """The contiguous share of group rank `rank` along `dim`, a view.

    Raises `UnsupportedError` when the length is not divisible by `size`.
    """
    length = tensor.shape[dim]
    if length % size:
        raise UnsupportedError(
            f"--seq-length {length} with --sequence-parallel-size {size}: the length must be "
            f"divisible by the size; {length - length % size} and "
            f"{length + size - length % size} are the nearest that work."
        )
    share = length // size
    return tensor.narrow(dim, rank * share, share)


def narrow_batch(batch: dict[str, Any], group: dist.ProcessGroup) -> dict[str, Any]:
    """Narrow every tensor of a batch to this rank's tokens, in place; returns the batch.

    batch: tensors `[b, s, ...]`; a dense `attention_mask` is `[b, 1, s, s]` and is cut along its
        query dimension. Entries that are None or have no sequence dimension stay, and so do
        document boundaries, which are of the whole sequence.
    """
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    for key, value in batch.items():
        if value is None or key in METADATA or not isinstance(value, torch.Tensor):
            continue
        if key == "attention_mask" and documents.are_boundaries(value):
            continue
        dim = 2 if key == "attention_mask" else 1
        batch[key] = narrow(value, dim, rank, size).contiguous()
    return batch


def wrap_per_sequence(original: Callable[..., Any]) -> Callable[..., Any]:
    """Patch for the 0.19 slicer of samples, under every importer of its caller.

    It also slices packed pre-training batches.
    """

    def _get_batch_on_this_cp_rank_per_sequence_balancing(
        batch: dict[str, Any], cp_group: dist.ProcessGroup
    ) -> dict[str, Any]:
        if state.contiguous():
            return narrow_batch(batch, cp_group)
        mask = batch.get("attention_mask")
        if not documents.are_boundaries(mask):
            return original(batch, cp_group=cp_group)
        return {**original({**batch, "attention_mask": None}, cp_group), "attention_mask": mask}

    return _get_batch_on_this_cp_rank_per_sequence_balancing


def wrap_per_document(original: Callable[..., Any]) -> Callable[..., Any]:
    """Patch for the 0.19 slicer of packed SFT batches."""

    def _get_batch_on_this_cp_rank_per_document_balancing(
        batch: dict[str, Any], cp_group: dist.ProcessGroup
    ) -> dict[str, Any]:
        if state.contiguous():
            return narrow_batch(batch, cp_group)
        return original(batch, cp_group=cp_group)

    return _get_batch_on_this_cp_rank_per_document_balancing


def wrap_single_function(original: Callable[..., Any]) -> Callable[..., Any]:
    """Patch for versions before 0.19, where one public function slices batches."""
    signature = inspect.signature(original)

    def get_batch_on_this_cp_rank(*args: Any, **kwargs: Any) -> dict[str, Any]:
        if not state.contiguous():
            return original(*args, **kwargs)
        from megatron.core import parallel_state

        bound = signature.bind(*args, **kwargs)
        group = bound.arguments.get("cp_group") or parallel_state.get_context_parallel_group()
        return narrow_batch(bound.arguments["batch"], group)

    return get_batch_on_this_cp_rank
