# SPDX-License-Identifier: Apache-2.0
"""Pretrain a GPT with Megatron's own training loop: all that is needed, and nothing of ours.

    megatron-seqpar run --nproc 2 scripts/pretrain_gpt.py --sequence-parallel-size 2 ARGS
    torchrun --nproc-per-node 2 scripts/pretrain_gpt.py ARGS    (plain Megatron, without the plugin)

The first line trains with the sequence dimension split over ranks, though nothing below mentions
it: the launcher patches Megatron before it runs this script. `ARGS` are Megatron's arguments. It is
written for Megatron 0.19; `older_megatron.py` beside it serves 0.16 to 0.18.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_args
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

try:
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.core.utils import (
        flatten_batch_for_packed_sequences,
        get_batch_on_this_cp_rank,
        get_batch_on_this_tp_rank,
    )
    from megatron.training import pretrain
    from megatron.training.argument_utils import (
        gpt_config_from_args,
        pretrain_cfg_container_from_args,
    )
    from megatron.training.arguments import parse_and_validate_args
    from megatron.training.training import update_seqlen_stats_from_cu_seqlens
except ImportError:  # before 0.19
    from older_megatron import (
        build_tokenizer,
        flatten_batch_for_packed_sequences,
        get_batch_on_this_cp_rank,
        get_batch_on_this_tp_rank,
        gpt_config_from_args,
        parse_and_validate_args,
        pretrain,
        pretrain_cfg_container_from_args,
        update_seqlen_stats_from_cu_seqlens,
    )

Batch = dict[str, torch.Tensor | None]
Loss = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]
KEYS = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")
PACKED_KEYS = ("cu_seqlens", "cu_seqlens_padded", "max_seqlen")


def packs_samples() -> bool:
    """Whether documents are laid end to end; before 0.19 there is no such flag."""
    return bool(getattr(get_args(), "dataloader_inter_document_masking", False))


def get_batch(data_iterator: Iterator[Batch] | None, vp_stage: int | None) -> Batch:
    """The next micro-batch, cut to this rank's tokens.

    Shapes: every entry `[b, s_local]` but the attention mask, which is None or `[b, 1, s, s]`.
    With `--dataloader-inter-document-masking` samples are laid end to end, `[1, b * s_local]`, and
    the ends of documents in the whole are `cu_seqlens`, `[1, n + 1]`. Pipeline stages that neither
    embed nor compute a loss get None for all but those.
    """
    args, packed = get_args(), packs_samples()
    if not is_first_or_last_pipeline_stage(vp_stage) and not packed:
        return dict.fromkeys((*KEYS, *PACKED_KEYS))
    batch: Batch = {}
    if mpu.get_tensor_model_parallel_rank() == 0:  # the others receive it from here
        assert data_iterator is not None
        loaded = next(data_iterator)
        for key in (*KEYS, *PACKED_KEYS):
            value = loaded.get(key)
            batch[key] = None if value is None else value.cuda(non_blocking=True)
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=packed,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=False,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    return get_batch_on_this_cp_rank(
        flatten_batch_for_packed_sequences(batch),
        is_hybrid_cp=False,
        cp_group=mpu.get_context_parallel_group(),
        use_per_sequence_balancing=packed,
    )


def packing(batch: Batch) -> PackedSeqParams | None:
    """What the model is told of a packed micro-batch; None for one that is not."""
    if batch["cu_seqlens"] is None or batch["max_seqlen"] is None:
        return None
    ends, longest = batch["cu_seqlens"].squeeze(0), int(batch["max_seqlen"].item())
    update_seqlen_stats_from_cu_seqlens(ends)  # for the FLOP count of the log
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        tokens_per_sample=get_args().seq_length,
    )


def loss_func(loss_mask: torch.Tensor | None, losses: torch.Tensor) -> Loss:
    """Sum of the token losses, number of tokens counted, and what to report of both.

    Shapes: `loss_mask` and `losses` `[b, s_local]`; the results are scalars, the report `[2]`.
    """
    assert loss_mask is not None  # only the last pipeline stage comes here, and it has one
    mask = loss_mask.view(-1).float()
    loss = torch.sum(losses.view(-1).float() * mask)
    tokens = mask.sum().detach()
    report = torch.stack([loss.detach(), tokens])
    return loss, tokens.to(torch.int), {"lm loss": report}


def forward_step(
    data_iterator: Iterator[Batch] | None, model: GPTModel
) -> tuple[torch.Tensor, Callable[[torch.Tensor], Loss]]:
    """One micro-batch forward: the model's output and the function that makes a loss of it."""
    batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    output = model(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
        packed_seq_params=packing(batch),
    )
    return output, partial(loss_func, batch["loss_mask"])


def datasets_provider(samples: list[int], vp_stage: int | None = None) -> list[Any]:
    """Training, validation and test datasets of the given numbers of samples."""
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    packing_options = {"inter_document_masking": True} if packs_samples() else {}
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        context_parallel_size=args.context_parallel_size,
        data_parallel_size=args.data_parallel_size,
        **packing_options,
    )

    def reads_data() -> bool:
        needed = is_first_or_last_pipeline_stage(vp_stage) or packs_samples()
        return mpu.get_tensor_model_parallel_rank() == 0 and needed

    dataset = MockGPTDataset if args.mock_data else GPTDataset
    built: list[Any] = BlendedMegatronDatasetBuilder(dataset, samples, reads_data, config).build()
    return built


datasets_provider.is_distributed = True  # type: ignore[attr-defined]  # each rank builds its own

if __name__ == "__main__":
    arguments = parse_and_validate_args()
    config = pretrain_cfg_container_from_args(arguments, gpt_config_from_args(arguments))
    pretrain(config, datasets_provider, ModelType.encoder_or_decoder, forward_step)
