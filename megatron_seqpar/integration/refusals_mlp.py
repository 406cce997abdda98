# SPDX-License-Identifier: Apache-2.0
"""What does not go together with MLPs in pieces, or run again at all.

A piece is a second forward and backward of the MLP's modules inside another module's backward;
what counts on one of each, or replaces the modules' forward, is refused.
"""

from __future__ import annotations

from typing import Any

from megatron_seqpar.config import AUTO, SeqParConfig, as_typed, is_default
from megatron_seqpar.integration.refusals import BOTH, CONFIG, Refusal, is_set, refuse

RECOMPUTED = ("mlp", "attention-qkv")
"""Values of `--seqpar-recompute` under which MLPs are computed again in backward."""

_WHOLE_MLPS = "Use --seqpar-mlp-chunks off and --seqpar-recompute none or attention-output"

PIECES_REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "--fp8-format",
        "fp8",
        is_set,
        "an MLP in FP8 is run again by Transformer Engine's own checkpointing only",
        "Use --recompute-granularity selective --recompute-modules mlp",
        BOTH,
    ),
    Refusal(
        "--fp4-format",
        "fp4",
        is_set,
        "an MLP in FP4 is run again by Transformer Engine's own checkpointing only",
        "Use --recompute-granularity selective --recompute-modules mlp",
        BOTH,
    ),
    Refusal(
        "TransformerConfig.use_kitchen",
        "use_kitchen",
        is_set,
        "quantised linear layers are not run again",
        _WHOLE_MLPS,
        (CONFIG,),
    ),
    Refusal(
        "--tp-comm-overlap",
        "tp_comm_overlap",
        is_set,
        "its buffers are made for the rows of a whole sequence",
        "Drop --tp-comm-overlap",
        BOTH,
    ),
    Refusal(
        "--delay-wgrad-compute",
        "delay_wgrad_compute",
        is_set,
        "it takes the gradients of an MLP's weights from what its one forward left behind",
        "Drop --delay-wgrad-compute",
        BOTH,
    ),
    Refusal(
        "--overlap-moe-expert-parallel-comm",
        "overlap_moe_expert_parallel_comm",
        is_set,
        "it runs the parts of a layer itself, interleaving two micro-batches' communication",
        "Drop --overlap-moe-expert-parallel-comm",
        BOTH,
    ),
    Refusal(
        "--mlp-chunks-for-training",
        "mlp_chunks_for_training",
        lambda value: value is not None and int(value) > 1,
        "both would cut the MLP, and the stock pieces all keep their activations",
        "Drop --mlp-chunks-for-training",
        BOTH,
    ),
    Refusal(
        "--recompute-modules",
        "recompute_modules",
        lambda value: bool({"mlp", "shared_experts"} & set(value or ())),
        "the pieces of an MLP are computed again already",
        "Drop mlp and shared_experts from --recompute-modules",
        BOTH,
    ),
    Refusal(
        "--use-transformer-engine-op-fuser",
        "use_transformer_engine_op_fuser",
        is_set,
        "it replaces the forward pass of the MLP",
        "Drop --use-transformer-engine-op-fuser",
        BOTH,
    ),
    Refusal(
        "--cpu-offloading-num-layers",
        "cpu_offloading_num_layers",
        is_set,
        "it moves activations that an MLP in pieces does not keep",
        "Drop --cpu-offloading-num-layers",
        BOTH,
    ),
    Refusal(
        "--fine-grained-activation-offloading",
        "fine_grained_activation_offloading",
        is_set,
        "it moves activations that an MLP in pieces does not keep",
        "Drop --fine-grained-activation-offloading",
        BOTH,
    ),
    Refusal(
        "--cuda-graph-impl",
        "cuda_graph_impl",
        lambda value: value not in (None, "none"),
        "backward runs the MLP again, which a captured graph of it does not expect",
        "Use --cuda-graph-impl none",
        BOTH,
    ),
    Refusal(
        "--enable-cuda-graph",
        "enable_cuda_graph",
        is_set,
        "backward runs the MLP again, which a captured graph of it does not expect",
        "Drop --enable-cuda-graph",
        BOTH,
    ),
    Refusal(
        "--external-cuda-graph",
        "external_cuda_graph",
        is_set,
        "backward runs the MLP again, which a captured graph of it does not expect",
        "Drop --external-cuda-graph",
        BOTH,
    ),
    Refusal(
        "--use-megatron-fsdp",
        "use_megatron_fsdp",
        is_set,
        "it gathers the weights of a module around its one forward and one backward",
        "Use --use-distributed-optimizer",
    ),
    Refusal(
        "--use-torch-fsdp2",
        "use_torch_fsdp2",
        is_set,
        "it gathers the weights of a module around its one forward and one backward",
        "Use --use-distributed-optimizer",
    ),
    Refusal(
        "--tensor-parallel-num-weight-shards",
        "gtp_weight_remat_size",
        lambda value: value is not None and int(value) > 1,
        "it gathers the weights of a module around its one forward and one backward",
        "Use --tensor-model-parallel-size and --use-distributed-optimizer",
        BOTH,
    ),
)
"""What does not go together with MLPs that are run again, in one piece or several."""


def _nothing_to_cut(source: Any) -> bool:
    """Whether a number of pieces was given and no layer's shared experts would use it."""
    shared = getattr(source, "moe_shared_expert_intermediate_size", None)
    overlapped = getattr(source, "moe_shared_expert_overlap", False)
    return getattr(source, "seqpar_mlp_chunks", None) != AUTO and (not shared or overlapped)


def _only_experts(source: Any) -> bool:
    """Whether every layer of a model that is not hybrid is a mixture of experts."""
    hybrid = ("hybrid_layer_pattern", "hybrid_override_pattern")
    if any(getattr(source, name, None) for name in hybrid):
        return False
    frequency = getattr(source, "moe_layer_freq", 1)
    dense = 0 in frequency if isinstance(frequency, (list, tuple)) else int(frequency) > 1
    return not dense and _nothing_to_cut(source)


_EXPERTS = "Use --seqpar-recompute mlp or attention-output, which serve mixtures of experts too"

CHUNK_REFUSALS: tuple[Refusal, ...] = (
    *PIECES_REFUSALS,
    Refusal(
        "--num-experts",
        "num_experts",
        is_set,
        "every layer is a mixture of routed experts, whose tokens are dispatched before they "
        "could be cut, and there is no other MLP",
        _EXPERTS,
        when=_only_experts,
    ),
    Refusal(
        "--hybrid-layer-pattern",
        "hybrid_layer_pattern",
        lambda pattern: pattern is not None and "-" not in pattern,
        "there is no MLP layer (-) to cut",
        "Use --seqpar-mlp-chunks off",
        when=_nothing_to_cut,
    ),
)


def refuse_pieces(source: Any, config: SeqParConfig, scope: str) -> None:
    """Refuse what MLPs do not go together with, if the settings run them again.

    Raises `UnsupportedError`.
    """
    asked = [] if is_default(config, "mlp_chunks") else ["mlp_chunks"]
    if config.recompute in RECOMPUTED:
        asked.append("recompute")
    for name in asked:
        refuse(source, as_typed(config, name), scope, table=PIECES_REFUSALS)
