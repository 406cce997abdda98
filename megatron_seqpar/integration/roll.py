# SPDX-License-Identifier: Apache-2.0
"""Shift tokens left by one across the axis, for multi-token prediction (MTP).

MTP trains position i on token i + 1 + d, so it rolls ids, labels and loss masks left. With
contiguous chunks only the first element of each chunk crosses a boundary: it goes to the
previous rank and becomes the last element there. The last rank gets a zero, as unsharded, and in
a packed batch so does the last token of every document.

MTP also divides by the number of tokens left in the rolled loss mask. A count taken on one rank
would weigh each rank alike however many tokens its mask keeps, so the count returned here is the
axis-wide one, divided by P because gradients are averaged over the axis afterwards.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megatron_seqpar.errors import UnsupportedError
from megatron_seqpar.integration import packed, state

_inside_mtp_loss = False


def roll_left(tensor: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
    """Roll a contiguously split tensor left by one along `dim`; a new tensor.

    tensor: this rank's chunk, at least one element along `dim`, same shape on every rank.
    Exactly `torch.roll(whole, -1, dim)` with the last element zero, narrowed to this rank.
    """
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    first = tensor.select(dim, 0).contiguous()
    # gloo and NCCL have no bool transfers; one byte a flag is the same payload.
    wire = first.view(torch.uint8) if first.dtype == torch.bool else first
    arriving = torch.zeros_like(wire)
    operations = []
    if rank > 0:
        previous = dist.get_global_rank(group, rank - 1)
        operations.append(dist.P2POp(dist.isend, wire, previous, group=group))
    if rank < size - 1:
        following = dist.get_global_rank(group, rank + 1)
        operations.append(dist.P2POp(dist.irecv, arriving, following, group=group))
    if operations:
        for request in dist.batch_isend_irecv(operations):
            request.wait()
    rolled = torch.roll(tensor, shifts=-1, dims=dim)
    last = arriving.view(torch.bool) if first.dtype == torch.bool else arriving
    rolled.select(dim, -1).copy_(last)
    return rolled


def _check_packed(tensor: torch.Tensor, dims: int, params: Any, group: dist.ProcessGroup) -> None:
    context = f"--sequence-parallel-size {group.size()}"
    packed.check(params, context)
    if dims not in (-1, tensor.dim() - 1):
        raise UnsupportedError(
            f"roll_tensor(dims={dims}) of a packed batch with {context}: the token dim must be the "
            "last one."
        )


def _ended(
    rolled: torch.Tensor, tensor: torch.Tensor, params: Any, group: dist.ProcessGroup
) -> torch.Tensor:
    """`rolled` with a zero in the last token of every document of a packed batch, `[..., s]`.

    Tokens behind the last document stay as they are in `tensor`, as in stock code.
    """
    cumulative = packed.cu_seqlens(params)
    count, rank = tensor.shape[-1], group.rank()
    last = packed.ends_document(cumulative, count, rank)
    behind = packed.behind(cumulative, count, rank)
    return torch.where(behind, tensor, rolled.masked_fill(last, 0))


def mean_count(values: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Sum of `values` over the whole axis divided by P, a 0-d tensor of at least float32."""
    count = values.sum()
    if not count.is_floating_point():
        count = count.float()
    dist.all_reduce(count, group=group)
    return count / dist.get_world_size(group)


def wrap_roll_tensor(original: Callable[..., Any]) -> Callable[..., Any]:
    """Patch for `multi_token_prediction.roll_tensor`."""

    def roll_tensor(
        tensor: torch.Tensor | None,
        shifts: int = -1,
        dims: int = -1,
        cp_group: dist.ProcessGroup | None = None,
        packed_seq_params: Any = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if not state.active() or cp_group is None or cp_group.size() == 1 or tensor is None:
            return original(tensor, shifts, dims, cp_group, packed_seq_params)
        if shifts != -1:
            raise UnsupportedError(
                f"roll_tensor(shifts={shifts}) with --sequence-parallel-size {cp_group.size()}: "
                "only a shift of -1, the one multi-token prediction uses, crosses ranks."
            )
        if packed_seq_params is not None:
            _check_packed(tensor, dims, packed_seq_params, cp_group)
        if state.contiguous():
            rolled = roll_left(tensor, dims, cp_group)
        else:
            rolled, _ = original(tensor, shifts, dims, cp_group)
        if packed_seq_params is not None:
            rolled = _ended(rolled, tensor, packed_seq_params, cp_group)
        if _inside_mtp_loss or rolled.is_floating_point():
            return rolled, mean_count(rolled, cp_group)
        return rolled, rolled.sum()

    roll_tensor.__doc__ = original.__doc__
    return roll_tensor


def wrap_process_mtp_loss(original: Callable[..., Any]) -> Callable[..., Any]:
    """Patch for `multi_token_prediction.process_mtp_loss`.

    With `--calculate-per-token-loss` the stock function multiplies each rank's MTP loss by that
    rank's own (tokens before rolling / tokens after). The ratio that makes the axis exact is the
    axis-wide one, so the stock function is asked for its other form, which divides by the count
    `roll_tensor` returns, with the axis-wide numerator folded into the scaling factor.
    """
    signature = inspect.signature(original)

    def process_mtp_loss(*args: Any, **kwargs: Any) -> torch.Tensor:
        global _inside_mtp_loss
        bound = signature.bind(*args, **kwargs)
        arguments = bound.arguments
        group = arguments.get("cp_group")
        if not state.active() or group is None or group.size() == 1:
            return original(*args, **kwargs)
        config, labels = arguments["config"], arguments["labels"]
        if config.calculate_per_token_loss and labels is not None:
            mask = arguments["loss_mask"]
            tokens = mean_count(torch.ones_like(labels) if mask is None else mask, group)
            config = copy.copy(config)
            config.calculate_per_token_loss = False
            config.mtp_loss_scaling_factor = config.mtp_loss_scaling_factor * tokens
            arguments["config"] = config
        _inside_mtp_loss = True
        try:
            return original(*bound.args, **bound.kwargs)
        finally:
            _inside_mtp_loss = False

    process_mtp_loss.__doc__ = original.__doc__
    return process_mtp_loss


def wrap_postprocess(original: Callable[..., Any]) -> Callable[..., Any]:
    """Patch for `GPTModel._postprocess` of 0.16, which computes the MTP loss itself.

    It divides by the count that `roll_tensor` returns, which is the axis-wide one here, for a loss
    mask of integers as well.
    """

    @functools.wraps(original)
    def _postprocess(self: Any, *args: Any, **kwargs: Any) -> Any:
        global _inside_mtp_loss
        if not state.active() or not self.config.mtp_num_layers:
            return original(self, *args, **kwargs)
        _inside_mtp_loss = True
        try:
            return original(self, *args, **kwargs)
        finally:
            _inside_mtp_loss = False

    return _postprocess
