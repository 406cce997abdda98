# SPDX-License-Identifier: Apache-2.0
"""What does not go together with one of our other settings, whatever the SP size.

One table a setting; it applies when the setting is not at its default.
"""

from __future__ import annotations

from typing import Any

from megatron_seqpar.config import SeqParConfig, as_typed, is_default
from megatron_seqpar.integration.refusals import BOTH, Refusal, is_set, refuse
from megatron_seqpar.integration.refusals_mlp import CHUNK_REFUSALS, refuse_pieces

RECOMPUTE_REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "--recompute-granularity",
        "recompute_granularity",
        is_set,
        "both would checkpoint the same layers",
        "Drop one of the two",
        BOTH,
    ),
    Refusal(
        "--recompute-activations",
        "recompute_activations",
        is_set,
        "both would checkpoint the same layers",
        "Drop one of the two",
    ),
    Refusal(
        "--fp8-format",
        "fp8",
        is_set,
        "repeating a layer in FP8 needs Transformer Engine's own checkpointing",
        "Use --recompute-granularity",
        BOTH,
    ),
    Refusal(
        "--fp4-format",
        "fp4",
        is_set,
        "repeating a layer in FP4 needs Transformer Engine's own checkpointing",
        "Use --recompute-granularity",
        BOTH,
    ),
    Refusal(
        "--cpu-offloading-num-layers",
        "cpu_offloading_num_layers",
        is_set,
        "offloading hooks the tensors that a checkpointed layer does not save",
        "Drop one of the two",
        BOTH,
    ),
    Refusal(
        "--moe-layer-recompute",
        "moe_layer_recompute",
        is_set,
        "both would run the experts again",
        "Drop --moe-layer-recompute",
        BOTH,
    ),
    Refusal(
        "--moe-paged-stash",
        "moe_paged_stash",
        is_set,
        "it keeps activations of experts that run again",
        "Drop --moe-paged-stash",
        BOTH,
    ),
    Refusal(
        "--distribute-saved-activations",
        "distribute_saved_activations",
        is_set,
        "it splits what Megatron's own recomputation keeps",
        "Drop --distribute-saved-activations",
        BOTH,
    ),
    Refusal(
        "--use-megatron-fsdp",
        "use_megatron_fsdp",
        is_set,
        "it gathers a layer's weights around its one forward and one backward",
        "Use --use-distributed-optimizer",
    ),
    Refusal(
        "--use-torch-fsdp2",
        "use_torch_fsdp2",
        is_set,
        "it gathers a layer's weights around its one forward and one backward",
        "Use --use-distributed-optimizer",
    ),
)

MASK_REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "--window-size",
        "window_size",
        is_set,
        "both say which tokens the layers' attention sees",
        "Drop one of the two; --seqpar-mask window:LEFT,RIGHT,SINKS is a window in every layer",
        BOTH,
    ),
)

ZIGZAG_REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "--sft",
        "sft",
        is_set,
        "packed samples are cut into contiguous chunks only",
        "Use --seqpar-token-layout contiguous",
    ),
    Refusal(
        "--dataloader-inter-document-masking",
        "dataloader_inter_document_masking",
        is_set,
        "packed documents are cut into contiguous chunks only",
        "Use --seqpar-token-layout contiguous",
    ),
)


def _over_one(value: Any) -> bool:
    return value is not None and int(value) > 1


def _whole_iteration(value: Any) -> bool:
    """Whether a CUDA graph setting, a word, an enum or a list of them, names the full iteration."""
    parts = value if isinstance(value, (list, tuple, set)) else [value]
    return "full_iteration" in [getattr(part, "name", part) for part in parts]


_READS_LOGITS = "it reads the logits of the whole sequence"
_DROP_CHUNKS = "Use --seqpar-loss-chunks off"

LOSS_CHUNKS_REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "--defer-embedding-wgrad-compute",
        "defer_embedding_wgrad_compute",
        is_set,
        "it keeps the logits' gradients of all micro-batches for later",
        "Drop one of the two",
        BOTH,
    ),
    Refusal(
        "--fp8-output-proj",
        "fp8_output_proj",
        is_set,
        "an MXFP8 head scales blocks of tokens together, and pieces would cut through them",
        "Drop one of the two",
        BOTH,
    ),
    Refusal("--config-logger-dir", "config_logger_dir", is_set, _READS_LOGITS, _DROP_CHUNKS, BOTH),
    Refusal("--logits-save-dir", "logits_save_dir", is_set, _READS_LOGITS, _DROP_CHUNKS),
    Refusal("--logits-load-dir", "logits_load_dir", is_set, _READS_LOGITS, _DROP_CHUNKS),
    Refusal(
        "--export-kd-teacher-load", "export_kd_teacher_load", is_set, _READS_LOGITS, _DROP_CHUNKS
    ),
    Refusal(
        "--cuda-graph-impl",
        "cuda_graph_impl",
        _whole_iteration,
        "the pieces are not captured in a graph of the whole iteration",
        "Use --cuda-graph-impl local or none",
        BOTH,
    ),
    Refusal(
        "--cuda-graph-scope",
        "cuda_graph_scope",
        _whole_iteration,
        "the pieces are not captured in a graph of the whole iteration",
        "Use another --cuda-graph-scope",
        BOTH,
    ),
    Refusal(
        "--use-megatron-fsdp",
        "use_megatron_fsdp",
        is_set,
        "it frees the head's weight before backward, which multiplies with it again",
        "Use --use-distributed-optimizer",
    ),
    Refusal(
        "--use-torch-fsdp2",
        "use_torch_fsdp2",
        is_set,
        "it frees the head's weight before backward, which multiplies with it again",
        "Use --use-distributed-optimizer",
    ),
    Refusal(
        "--tensor-parallel-num-weight-shards",
        "gtp_weight_remat_size",
        _over_one,
        "it gathers the head's weight for every product, and pieces are many products",
        "Use --tensor-model-parallel-size and --use-distributed-optimizer",
        BOTH,
    ),
)

BY_SETTING: dict[str, tuple[Refusal, ...]] = {
    "recompute": RECOMPUTE_REFUSALS,
    "mask": MASK_REFUSALS,
    "token_layout": ZIGZAG_REFUSALS,
    "mlp_chunks": CHUNK_REFUSALS,
    "loss_chunks": LOSS_CHUNKS_REFUSALS,
}
"""Field of `SeqParConfig` -> its table."""


def refuse_by_setting(source: Any, config: SeqParConfig, scope: str) -> None:
    """Refuse what does not go together with the settings. Raises `UnsupportedError`."""
    for name, table in BY_SETTING.items():
        if not is_default(config, name):
            refuse(source, as_typed(config, name), scope, table=table)
    if is_default(config, "mlp_chunks"):  # the table of mlp_chunks has these rows
        refuse_pieces(source, config, scope)
