# SPDX-License-Identifier: Apache-2.0
"""Documents inside a sample: `--reset-attention-mask` without a mask of s x s.

Stock Megatron makes a boolean matrix a sample in the data loader: the tokens behind an
end-of-document token see nothing before them. Here the same place in the data loader yields one
byte a token instead, 1 where a document begins (*marks*), and what then travels as the
micro-batch's `attention_mask` is where documents end: an int32 tensor `[b, n + 1]` on the host
(*boundaries*), each row 0, end, end, ..., padded with its last end. It is of the whole sequence on
every rank, and on the host because attention's schedule is made there: marks are read from the
device once a micro-batch, not once a layer. As a tensor it goes wherever Megatron takes an
attention mask: through checkpointed layers, multi-token prediction and micro-batches in flight.

Stock hands no mask to the middle stages of a pipeline, whose layers then attend across documents.
Here every stage reads the marks.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megatron_seqpar.attention import Documents, Mask
from megatron_seqpar.errors import UnsupportedError
from megatron_seqpar.integration import state
from megatron_seqpar.integration.refusals import packs

FLAG = "--reset-attention-mask"


def marks(tokens: torch.Tensor, end_of_document: int) -> torch.Tensor:
    """1 where a document begins, else 0: uint8, shaped as `tokens` `[..., s]`.

    A document ends with its end-of-document token, so the token behind it begins one; the first
    token of a sample always does.
    """
    begins = torch.ones_like(tokens, dtype=torch.uint8)
    begins[..., 1:] = tokens[..., :-1] == end_of_document
    return begins


def boundaries(begins: torch.Tensor) -> torch.Tensor:
    """Document boundaries of a batch from its marks.

    begins: `[b, s]`, nonzero where a document begins; on any device, read once.
    Returns int32 `[b, n + 1]` on the CPU: 0, the documents' ends, and s again to fill the row.
    """
    length = begins.shape[1]
    rows = [[*row.nonzero().flatten().tolist(), length] for row in begins.cpu()]
    width = max(len(row) for row in rows)
    return torch.tensor([row + [length] * (width - len(row)) for row in rows], dtype=torch.int32)


def are_boundaries(attention_mask: torch.Tensor | None) -> bool:
    """Whether a batch's attention mask is made by `boundaries`, and not a dense one."""
    return (
        attention_mask is not None
        and attention_mask.dtype == torch.int32
        and attention_mask.dim() == 2
    )


def within(inner: Mask, ends: tuple[int, ...], seq_length: int) -> Mask:
    """`inner` inside each document.

    ends: 0 and the documents' ends, never decreasing; tokens of the sequence behind the last end
        see nothing. Empty documents are left out, and one document is `inner` itself, so that
        equal masks are equal values and their schedules are made once.
    """
    kept = tuple(dict.fromkeys(ends))
    return inner if kept == (0, seq_length) else Documents(kept, inner)


def mask_of(
    inner: Mask, attention_mask: torch.Tensor | None, seq_length: int
) -> Mask | tuple[Mask, ...]:
    """`inner` restricted to the documents of a micro-batch, one mask a sample.

    attention_mask: what `boundaries` made, or anything else for no documents.
    seq_length: tokens of a whole sample.
    """
    if attention_mask is None or not are_boundaries(attention_mask):
        return inner
    masks = [within(inner, tuple(row), seq_length) for row in attention_mask.tolist()]
    return masks[0] if len(masks) == 1 else tuple(masks)


def expected(args: Any) -> bool:
    """Whether the argument flags ask for attention inside documents."""
    return bool(getattr(args, "reset_attention_mask", False)) or packs(args)


def dataloader_makes_marks(args: Any) -> bool:
    """What `create_attention_mask_in_dataloader` becomes where our attention is used.

    The batch then holds marks; without documents nothing: a causal mask needs no tensor. Packed
    batches carry their boundaries themselves.
    """
    return expected(args) and not packs(args)


def wrap_get_ltor_masks_and_position_ids(original: Callable[..., Any]) -> Callable[..., Any]:
    """Patch for `gpt_dataset._get_ltor_masks_and_position_ids`: marks in the dense mask's place."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def _get_ltor_masks_and_position_ids(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        arguments = bound.arguments
        if not (state.config().replaces_core_attention and arguments["create_attention_mask"]):
            return original(*args, **kwargs)
        arguments["create_attention_mask"] = False
        _, loss_mask, position_ids = original(*bound.args, **bound.kwargs)
        begins = marks(arguments["data"], arguments["eod_token"])
        if not arguments["reset_attention_mask"]:
            begins[1:] = 0
        return begins, loss_mask, position_ids

    return _get_ltor_masks_and_position_ids


def wrap_get_batch_on_this_tp_rank(original: Callable[..., Any]) -> Callable[..., Any]:
    """Patch for `core.utils.get_batch_on_this_tp_rank`: the batch's marks become boundaries."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def get_batch_on_this_tp_rank(*args: Any, **kwargs: Any) -> dict[str, Any]:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = bound.arguments
        if not (
            state.config().replaces_core_attention
            and arguments["create_attention_mask_in_dataloader"]
        ):
            return original(*args, **kwargs)
        begins = _received_marks(arguments)
        arguments["create_attention_mask_in_dataloader"] = False
        if arguments["tp_rank"] == 0:
            arguments["batch"]["attention_mask"] = None
        batch: dict[str, Any] = original(*bound.args, **bound.kwargs)
        if not _feeds_the_model(arguments):
            batch.update(dict.fromkeys(("tokens", "labels", "loss_mask", "position_ids")))
        batch["attention_mask"] = boundaries(begins)
        return batch

    return get_batch_on_this_tp_rank


def _received_marks(arguments: Any) -> torch.Tensor:
    """The batch's marks on every rank of the tensor-parallel group, `[b, s]`."""
    group, begins = arguments["broadcast_group"], None
    if arguments["tp_rank"] == 0:
        begins = arguments["batch"].get("attention_mask")
        if begins is None or begins.dtype != torch.uint8 or begins.dim() != 2:
            shape = None if begins is None else tuple(begins.shape)
            raise UnsupportedError(
                f"{FLAG}: the batch's attention_mask, shaped {shape}, does not say where "
                "documents begin. Use a dataset built on Megatron's GPTDataset, loaded by "
                "--num-workers 0 or by forked workers."
            )
    else:
        shape = (arguments["micro_batch_size"], arguments["seq_length"])
        begins = torch.empty(shape, dtype=torch.uint8, device=torch.cuda.current_device())
    if dist.get_world_size(group) > 1:
        dist.broadcast(begins, arguments["broadcast_src_rank"], group=group)
    return begins


def _feeds_the_model(arguments: Any) -> bool:
    """Whether this pipeline stage embeds tokens or computes a loss."""
    return (
        arguments["pipeline_model_parallel_size"] == 1
        or arguments["is_pipeline_first_stage"]
        or arguments["is_pipeline_last_stage"]
        or arguments["mtp_on_this_rank"]
    )


def wrap_is_first_or_last_pipeline_stage(original: Callable[..., bool]) -> Callable[..., bool]:
    """Patch for `training.utils.is_first_or_last_pipeline_stage`, which says who reads data.

    With documents every stage does: attention is in all of them. Stock packed pre-training means
    to as well, but builds no dataset on the stages between.
    """

    @functools.wraps(original)
    def is_first_or_last_pipeline_stage(vp_stage: int | None) -> bool:
        return original(vp_stage) or _every_stage_reads_documents()

    return is_first_or_last_pipeline_stage


def _every_stage_reads_documents() -> bool:
    if not state.config().replaces_core_attention:
        return False
    from megatron.training import get_args

    return expected(get_args())
