# SPDX-License-Identifier: Apache-2.0
"""What pretrain_gpt.py takes from Megatron 0.19, made of megatron-core 0.16, 0.17 or 0.18.

The names and signatures are those of 0.19; what is not needed there is not here. Before 0.19
samples are not packed, so nothing below deals with `cu_seqlens`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import utils as core_utils
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt import gpt_layer_specs as specs
from megatron.core.package_info import __version__
from megatron.core.transformer.spec_utils import import_module
from megatron.training import arguments, get_args, get_tokenizer, training
from megatron.training import utils as training_utils

if hasattr(core_utils, "flatten_batch_for_packed_sequences"):
    raise ImportError(
        f"megatron-core {__version__} is not older than 0.19; something else is amiss"
    )

Batch = dict[str, torch.Tensor | None]
# 0.18 passes batches and settings as 0.19 does; before, functions read both for themselves
PASSES_BATCHES = hasattr(core_utils, "get_batch_on_this_tp_rank")
PACKED_KEYS = ("cu_seqlens", "cu_seqlens_padded", "max_seqlen")


def build_tokenizer(args: Any) -> Any:
    """The tokenizer that the arguments ask for."""
    if getattr(args, "legacy_tokenizer", False):  # 0.16 has two tokenizer systems
        return get_tokenizer()
    try:
        from megatron.core.tokenizers.utils import build_tokenizer as module
    except ImportError:
        from megatron.core.tokenizers.text.utils import build_tokenizer as module
    return module.build_tokenizer(args)


def flatten_batch_for_packed_sequences(batch: Batch) -> Batch:
    """Nothing is packed."""
    return batch


def get_batch_on_this_tp_rank(
    batch: Batch, *, has_cu_seqlens: bool, mtp_on_this_rank: bool, **options: Any
) -> Batch:
    """The batch of tensor-parallel rank 0, on every rank of its group."""
    if has_cu_seqlens:
        raise ValueError(f"packed samples need megatron-core 0.19; this is {__version__}")
    if PASSES_BATCHES:
        stock = core_utils.get_batch_on_this_tp_rank
        found = stock(batch, is_sft=False, mtp_on_this_rank=mtp_on_this_rank, **options)
    else:
        given = {key: value for key, value in batch.items() if value is not None}
        data_iterator = iter([given]) if options["tp_rank"] == 0 else None
        found = training_utils.get_batch_on_this_tp_rank(data_iterator, mtp_on_this_rank)
    return {**dict.fromkeys(PACKED_KEYS), **found}


def get_batch_on_this_cp_rank(
    batch: Batch, *, is_hybrid_cp: bool, cp_group: Any, use_per_sequence_balancing: bool
) -> Batch:
    """This context-parallel rank's tokens."""
    options = {"is_hybrid_cp": is_hybrid_cp} if PASSES_BATCHES else {}
    found: Batch = core_utils.get_batch_on_this_cp_rank(batch, cp_group=cp_group, **options)
    return found


def update_seqlen_stats_from_cu_seqlens(ends: torch.Tensor) -> None:
    """Counts packed documents, and there are none."""


def parse_and_validate_args() -> Any:
    """The arguments; before 0.18 `pretrain` parses them itself, and this returns None."""
    parse = getattr(arguments, "parse_and_validate_args", None)
    return None if parse is None else parse()


def gpt_config_from_args(args: Any) -> Any:
    """None: the model is described by `model_provider` instead."""
    return None


def pretrain_cfg_container_from_args(args: Any, model: Any) -> Any:
    """What 0.18's `pretrain` takes first, None before."""
    if args is None:
        return None
    from megatron.training import argument_utils

    return argument_utils.pretrain_cfg_container_from_args(args, model)


def model_provider(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: Any = None,
    pg_collection: Any = None,
) -> GPTModel:
    """This pipeline stage's part of the model that the arguments describe."""
    args = get_args()
    for name in ("experimental_attention_variant", "heterogeneous_layers_config_path"):
        if getattr(args, name, None) is not None:
            flag = f"--{name.replace('_', '-')} {getattr(args, name)}"
            raise ValueError(
                f"{flag}: with megatron-core {__version__} use that release's own pretrain_gpt.py"
            )
    if config is None:
        config = arguments.core_transformer_config_from_args(args)
    engine = args.transformer_impl == "transformer_engine"
    norms = {"normalization": args.normalization, "qk_l2_norm": args.qk_l2_norm}
    if args.spec is not None:
        layers = import_module(args.spec)
    else:
        layers = specs.get_gpt_decoder_block_spec(config, engine, vp_stage=vp_stage, **norms)
    mtp = None
    if args.mtp_num_layers is not None:
        last = specs.get_gpt_decoder_layer_specs(config, engine, vp_stage=vp_stage, **norms)[-1]
        mtp = specs.get_gpt_mtp_block_spec(config, last, engine, vp_stage=vp_stage)
    return GPTModel(
        config=config,
        transformer_layer_spec=layers,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        fp16_lm_cross_entropy=args.fp16_lm_cross_entropy,
        parallel_output=True,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        mtp_block_spec=mtp,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )


def pretrain(
    config: Any,
    datasets_provider: Callable[..., list[Any]],
    model_type: Any,
    forward_step: Callable[..., Any],
) -> None:
    """Megatron's `pretrain`, which builds the model by `model_provider`."""
    first = next(iter(inspect.signature(training.pretrain).parameters))
    settings = (config,) if first == "cfg_container" else ()
    training.pretrain(*settings, datasets_provider, model_provider, model_type, forward_step)
