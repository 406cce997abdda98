# SPDX-License-Identifier: Apache-2.0
"""What does not go together with the SP axis, as one table.

Every row names the flag, when it applies, why it cannot be served and what to use instead. Rows
look at attribute names that Megatron's argument namespace and its `TransformerConfig` share, so
the same row refuses a command line before the first step and a hand-built model at construction.
An attribute that the running version does not have never applies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from megatron_seqpar.errors import UnsupportedError
from megatron_seqpar.integration import state

ARGUMENTS = "arguments"
CONFIG = "config"


@dataclass(frozen=True)
class Refusal:
    """One combination that is refused.

    flag: the command line flag as the user types it.
    attribute: the attribute that holds its value.
    applies: whether that value is refused.
    reason: why it cannot be served.
    alternative: what to use instead.
    scopes: where the attribute lives; rows of the config scope also guard core attention when it
        replaces Megatron's on one rank.
    when: a further condition on the namespace or config that the attribute comes from.
    since: the first family of megatron-core that serves it; "" where none does.
    """

    flag: str
    attribute: str
    applies: Callable[[Any], bool]
    reason: str
    alternative: str
    scopes: tuple[str, ...] = (ARGUMENTS,)
    when: Callable[[Any], bool] = lambda source: True
    since: str = ""

    def found_in(self, source: Any) -> bool:
        """Whether `source` has the attribute with a value that is refused."""
        if not hasattr(source, self.attribute):
            return False
        return self.applies(getattr(source, self.attribute)) and self.when(source)

    def message(self, value: Any, context: str) -> str:
        """The refusal's text, e.g. '--sft True with --sequence-parallel-size 2: ...'."""
        shown = getattr(value, "name", value)
        reason = self.reason
        if self.since:
            reason += f" (this is megatron-core {_running()})"
        return f"{self.flag} {shown} with {context}: {reason}. {self.alternative}."


def _running() -> str:
    from megatron.core import package_info

    return str(package_info.__version__)


def is_set(value: Any) -> bool:
    return bool(value)


def _over_one(value: Any) -> bool:
    return value is not None and int(value) > 1


def _above_zero(value: Any) -> bool:
    return value is not None and float(value) > 0.0


def _not(*allowed: Any) -> Callable[[Any], bool]:
    return lambda value: value is not None and value not in allowed


def _has_layers(symbols: str) -> Callable[[Any], bool]:
    """Whether a hybrid layer pattern holds one of the layer symbols."""
    return lambda pattern: pattern is not None and any(symbol in pattern for symbol in symbols)


def _not_a_pair(value: Any) -> bool:
    if value is None:
        return False
    return not (
        isinstance(value, (list, tuple))
        and len(value) == 2
        and all(isinstance(reach, int) and reach >= -1 for reach in value)
    )


DOCUMENTS_SINCE = "0.19"
"""The first family of megatron-core that hands documents to attention in one place."""


def _before_documents(source: Any) -> bool:
    """Whether the arguments are those of a Megatron older than `DOCUMENTS_SINCE`."""
    return not hasattr(source, "dataloader_inter_document_masking")


def _packed_rows_matter(source: Any) -> bool:
    stages = getattr(source, "pipeline_model_parallel_size", 1)
    return packs(source) and (stages > 1 or bool(getattr(source, "num_experts", None)))


def packs(source: Any) -> bool:
    """Whether argument flags ask for packed (THD) batches."""
    flags = ("sft", "dataloader_inter_document_masking")
    return any(getattr(source, flag, False) for flag in flags)


def _fused_latent_rope(source: Any) -> bool:
    return bool(
        state.contiguous()
        and getattr(source, "multi_latent_attention", False)
        and getattr(source, "apply_rope_fusion", False)
    )


BOTH = (ARGUMENTS, CONFIG)

REFUSALS: tuple[Refusal, ...] = (
    # What takes the same place as the axis.
    Refusal(
        "--context-parallel-size",
        "context_parallel_size",
        _over_one,
        "the sequence-parallel axis takes stock context parallelism's place",
        "Drop --context-parallel-size",
    ),
    Refusal(
        "--hierarchical-context-parallel-sizes",
        "hierarchical_context_parallel_sizes",
        is_set,
        "it splits stock context parallelism, which the axis replaces",
        "Drop --hierarchical-context-parallel-sizes",
    ),
    Refusal(
        "--hybrid-context-parallel",
        "hybrid_context_parallel",
        is_set,
        "its group sizes change from batch to batch",
        "Use a fixed --sequence-parallel-size",
    ),
    Refusal(
        "--yaml-cfg",
        "yaml_cfg",
        is_set,
        "a YAML file replaces the parsed arguments, and the axis with them",
        "Pass the settings as command line flags",
    ),
    # Data that is not one sequence a sample.
    Refusal(
        "--sft",
        "sft",
        is_set,
        f"megatron-core before {DOCUMENTS_SINCE} slices packed samples elsewhere",
        f"Use megatron-core {DOCUMENTS_SINCE} or train on unpacked sequences",
        when=_before_documents,
        since=DOCUMENTS_SINCE,
    ),
    Refusal(
        "--reset-attention-mask",
        "reset_attention_mask",
        is_set,
        f"megatron-core before {DOCUMENTS_SINCE} makes the mask of documents as an s x s matrix",
        f"Use megatron-core {DOCUMENTS_SINCE} or drop --reset-attention-mask",
        BOTH,
        when=_before_documents,
        since=DOCUMENTS_SINCE,
    ),
    Refusal(
        "--micro-batch-size",
        "micro_batch_size",
        _over_one,
        "packed samples (--sft, --dataloader-inter-document-masking) are laid end to end, but "
        "pipeline stages and mixture-of-experts layers count on one row a sample",
        "Set --micro-batch-size 1",
        when=_packed_rows_matter,
    ),
    Refusal(
        "--perform-rl-step",
        "perform_rl_step",
        is_set,
        "reinforcement learning builds an inference model without the axis and packs sequences",
        "Use stock --context-parallel-size",
    ),
    Refusal(
        "--vision-pretraining",
        "vision_pretraining",
        is_set,
        "vision models are not split over the axis",
        "Use tensor parallelism",
    ),
    # Attention that is not plain softmax(Q K^T) V.
    Refusal(
        "--attention-dropout",
        "attention_dropout",
        _above_zero,
        "attention without stored probabilities cannot drop them out alike on every rank",
        "Set --attention-dropout 0",
        BOTH,
    ),
    Refusal(
        "--qk-clip",
        "qk_clip",
        is_set,
        "it reads the largest attention logit, which the attention kernels do not return",
        "Drop --qk-clip or use --qk-layernorm",
        BOTH,
    ),
    Refusal(
        "--log-max-attention-logit",
        "log_max_attention_logit",
        is_set,
        "the attention kernels do not return the largest attention logit",
        "Drop --log-max-attention-logit",
        BOTH,
    ),
    Refusal(
        "--window-size",
        "window_size",
        _not_a_pair,
        "a window is how many tokens it reaches before and after each token, -1 for no limit",
        "Give two numbers, like --window-size 4095,0",
        BOTH,
    ),
    Refusal(
        "--position-embedding-type",
        "position_embedding_type",
        _not("rope", "learned_absolute", "yarn", "none"),
        "it needs an attention bias or positions in several dimensions",
        "Use --position-embedding-type rope",
    ),
    Refusal(
        "--experimental-attention-variant",
        "experimental_attention_variant",
        is_set,
        "the variant does its own attention and its own context parallelism",
        "Use softmax attention",
        BOTH,
    ),
    Refusal(
        "--hybrid-layer-pattern",
        "hybrid_layer_pattern",
        _has_layers("DG"),
        "sparse-attention (D) and gated-delta-net (G) layers are not split over the axis",
        "Use attention (*), latent attention (+), Mamba (M), MLP (-) and MoE (E) layers",
    ),
    Refusal(
        "--rope-type",
        "rope_type",
        lambda value: value == "yarn",
        "the fused rotary embedding of latent attention with YaRN assumes the stock token order",
        "Add --no-rope-fusion, or use --rope-type rope or --seqpar-token-layout zigzag",
        BOTH,
        when=_fused_latent_rope,
    ),
    Refusal(
        "--cache-mla-latents",
        "cache_mla_latents",
        is_set,
        "it is for generation, which the axis does not serve",
        "Drop --cache-mla-latents",
        BOTH,
    ),
    Refusal(
        "--use-kitchen-attention",
        "use_kitchen_attention",
        is_set,
        "it replaces the core attention",
        "Drop --use-kitchen-attention",
        BOTH,
    ),
    Refusal(
        "TransformerConfig.fp8_dot_product_attention",
        "fp8_dot_product_attention",
        is_set,
        "the attention kernels take fp16, bf16 or fp32",
        "Keep FP8 for the linear layers only",
        (CONFIG,),
    ),
    Refusal(
        "TransformerConfig.fp8_multi_head_attention",
        "fp8_multi_head_attention",
        is_set,
        "the attention kernels take fp16, bf16 or fp32",
        "Keep FP8 for the linear layers only",
        (CONFIG,),
    ),
    Refusal(
        "--batch-invariant-mode",
        "batch_invariant_mode",
        is_set,
        "it pins Transformer Engine's attention kernels",
        "Drop --batch-invariant-mode",
        BOTH,
    ),
    # Execution that goes around the attention module or freezes it.
    Refusal(
        "--overlap-moe-expert-parallel-comm",
        "overlap_moe_expert_parallel_comm",
        is_set,
        "it runs the parts of a layer itself, interleaving two micro-batches' communication",
        "Drop --overlap-moe-expert-parallel-comm",
        BOTH,
    ),
    Refusal(
        "--cuda-graph-impl",
        "cuda_graph_impl",
        _not("none"),
        "attention's transfers cannot be captured in a CUDA graph",
        "Use --cuda-graph-impl none",
        BOTH,
    ),
    Refusal(
        "--enable-cuda-graph",
        "enable_cuda_graph",
        is_set,
        "attention's transfers cannot be captured in a CUDA graph",
        "Drop --enable-cuda-graph",
        BOTH,
    ),
    Refusal(
        "--external-cuda-graph",
        "external_cuda_graph",
        is_set,
        "attention's transfers cannot be captured in a CUDA graph",
        "Drop --external-cuda-graph",
        BOTH,
    ),
    Refusal(
        "--use-megatron-fsdp",
        "use_megatron_fsdp",
        is_set,
        "it gathers parameters on streams of its own around every module",
        "Use --use-distributed-optimizer",
    ),
    Refusal(
        "--use-torch-fsdp2",
        "use_torch_fsdp2",
        is_set,
        "it gathers parameters on streams of its own around every module",
        "Use --use-distributed-optimizer",
    ),
    Refusal(
        "--fine-grained-activation-offloading",
        "fine_grained_activation_offloading",
        is_set,
        "it hooks the tensors that the stock core attention saves",
        "Use --recompute-granularity",
        BOTH,
    ),
    Refusal(
        "--use-tp-pp-dp-mapping",
        "use_tp_pp_dp_mapping",
        is_set,
        "with pipeline stages inside the data-parallel axis Megatron wants attention and experts "
        "to have the same data-parallel size, which no split of the sequence leaves them",
        "Keep Megatron's default rank order",
        when=lambda source: getattr(source, "pipeline_model_parallel_size", 1) > 1,
    ),
    Refusal(
        "--inprocess-restart",
        "inprocess_restart",
        is_set,
        "a restart re-creates process groups under live attention transfers",
        "Let the launcher restart the job",
    ),
    Refusal(
        "--tensor-parallel-num-weight-shards",
        "gtp_weight_remat_size",
        _over_one,
        "generalised weight sharding adds an axis between tensor parallelism and the "
        "sequence-parallel axis",
        "Use --tensor-model-parallel-size and --use-distributed-optimizer",
    ),
)


def refuse(source: Any, context: str, scope: str, *, table: Iterable[Refusal] = REFUSALS) -> None:
    """Raise `UnsupportedError` for the rows of `scope` that apply to `source`, all of them.

    source: an argument namespace or a `TransformerConfig`.
    context: what the combination is with, e.g. '--sequence-parallel-size 2'.
    """
    found = [
        row.message(getattr(source, row.attribute), context)
        for row in table
        if scope in row.scopes and row.found_in(source)
    ]
    if found:
        raise UnsupportedError("\n".join(found))
