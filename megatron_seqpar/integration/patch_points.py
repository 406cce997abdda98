# SPDX-License-Identifier: Apache-2.0
"""The table of every symbol of Megatron that the plugin replaces.

Each point names the families of megatron-core that it was checked on (`compatibility.FAMILIES`),
and is applied on those and on the unknown versions nearest to them. The documentation's table of
patch points is generated from this one, and a test compares them.
"""

from __future__ import annotations

from megatron_seqpar.compatibility import FAMILIES, before, since
from megatron_seqpar.integration import (
    arguments,
    axis,
    batch,
    documents,
    lm_head,
    loss,
    mamba,
    mlp,
    packed,
    recompute,
    recompute_parts,
    roll,
    rotary,
    spec,
    steps,
)
from megatron_seqpar.integration.patching import PatchPoint

_ALL = FAMILIES
_0_19 = since("0.19")
_BEFORE_0_19 = before("0.19")
_HYBRID = since("0.18")  # HybridModel took MambaModel's place
_MAMBA = before("0.18")

PATCH_POINTS: tuple[PatchPoint, ...] = (
    PatchPoint(
        "megatron.training.arguments.add_megatron_arguments",
        arguments.wrap_add_megatron_arguments,
        _ALL,
        "adds the flags; folds the axis into context_parallel_size; refuses what is unsupported",
        optional=True,
    ),
    PatchPoint(
        "megatron.training.arguments.validate_args",
        arguments.wrap_validate_args,
        _ALL,
        "repeats the refusals once the arguments are complete; lifts the demand for a length "
        "divisible by twice the size",
        optional=True,
    ),
    PatchPoint(
        "megatron.core.parallel_state.initialize_model_parallel",
        axis.wrap_initialize_model_parallel,
        _ALL,
        "adds the axis and its communicator",
    ),
    PatchPoint(
        "megatron.core.parallel_state.destroy_model_parallel",
        axis.wrap_destroy_model_parallel,
        _ALL,
        "forgets the axis with the other groups",
    ),
    PatchPoint(
        "megatron.core.process_groups_config.ProcessGroupCollection.use_mpu_process_groups",
        axis.wrap_use_mpu_process_groups,
        _ALL,
        "collections carry the axis as .sp",
    ),
    PatchPoint(
        "megatron.core.utils._get_batch_on_this_cp_rank_per_sequence_balancing",
        batch.wrap_per_sequence,
        _0_19,
        "contiguous tokens instead of paired chunks",
    ),
    PatchPoint(
        "megatron.core.utils._get_batch_on_this_cp_rank_per_document_balancing",
        batch.wrap_per_document,
        _0_19,
        "contiguous tokens instead of paired chunks in every document",
    ),
    PatchPoint(
        "megatron.core.utils.get_batch_on_this_tp_rank",
        documents.wrap_get_batch_on_this_tp_rank,
        _0_19,
        "hands out where documents end instead of a dense mask",
    ),
    PatchPoint(
        "megatron.core.datasets.gpt_dataset._get_ltor_masks_and_position_ids",
        documents.wrap_get_ltor_masks_and_position_ids,
        _0_19,
        "marks where documents begin instead of making a dense mask",
    ),
    PatchPoint(
        "megatron.core.datasets.gpt_dataset.GPTDatasetConfig.__post_init__",
        packed.wrap_dataset_config_post_init,
        _0_19,
        "packed samples are not padded to pairs of chunks",
    ),
    PatchPoint(
        "megatron.training.utils.common_utils.is_first_or_last_pipeline_stage",
        documents.wrap_is_first_or_last_pipeline_stage,
        _0_19,
        "with documents, the middle stages of a pipeline read data too",
        optional=True,
    ),
    PatchPoint(
        "megatron.core.utils.get_batch_on_this_cp_rank",
        batch.wrap_single_function,
        _BEFORE_0_19,
        "contiguous tokens instead of paired chunks",
    ),
    PatchPoint(
        "megatron.core.models.common.embeddings.rope_utils.get_pos_emb_on_this_cp_rank",
        rotary.wrap_get_pos_emb_on_this_cp_rank,
        _ALL,
        "rotary positions of contiguous tokens, on any device",
    ),
    PatchPoint(
        "megatron.core.models.common.embeddings.rope_utils.apply_rotary_pos_emb",
        rotary.wrap_apply_rotary_pos_emb,
        _ALL,
        "rotary positions of contiguous tokens inside their documents, for packed batches",
    ),
    PatchPoint(
        "megatron.core.transformer.multi_token_prediction.roll_tensor",
        roll.wrap_roll_tensor,
        _ALL,
        "the first token of a chunk goes to the previous rank; tokens counted over the axis",
    ),
    PatchPoint(
        "megatron.core.transformer.multi_token_prediction.process_mtp_loss",
        lambda original: roll.wrap_process_mtp_loss(lm_head.wrap_process_mtp_loss(original)),
        _0_19,
        "the MTP loss is averaged over all tokens of the axis; with a loss in pieces, its heads "
        "find predictions too",
    ),
    PatchPoint(
        "megatron.core.transformer.multi_token_prediction.process_mtp_loss",
        roll.wrap_process_mtp_loss,
        ("0.17", "0.18"),
        "the MTP loss is averaged over all tokens of the axis",
    ),
    PatchPoint(
        "megatron.core.transformer.multi_token_prediction._compute_mtp_acceptance_counts",
        lm_head.wrap_compute_mtp_acceptance_counts,
        _0_19,
        "counts predictions of a loss in pieces",
    ),
    PatchPoint(
        "megatron.core.models.gpt.gpt_model.GPTModel._postprocess",
        lm_head.wrap_forward,
        since("0.17"),
        "makes no logits where a loss in pieces is asked for",
    ),
    PatchPoint(
        "megatron.core.models.gpt.gpt_model.GPTModel._postprocess",
        lambda original: roll.wrap_postprocess(lm_head.wrap_forward(original)),
        ("0.16",),
        "makes no logits where a loss in pieces is asked for; the MTP loss, which is computed "
        "here, is averaged over all tokens of the axis",
    ),
    PatchPoint(
        "megatron.core.models.hybrid.hybrid_model.HybridModel.forward",
        lm_head.wrap_forward,
        _HYBRID,
        "makes no logits where a loss in pieces is asked for",
    ),
    PatchPoint(
        "megatron.core.models.mamba.mamba_model.MambaModel.forward",
        lm_head.wrap_forward,
        _MAMBA,
        "makes no logits where a loss in pieces is asked for",
    ),
    PatchPoint(
        "megatron.core.models.common.language_module.language_module.LanguageModule"
        ".compute_language_model_loss",
        lm_head.wrap_compute_language_model_loss,
        _ALL,
        "computes logits and loss in pieces, when asked",
    ),
    PatchPoint(
        "megatron.core.ssm.mamba_context_parallel._undo_attention_load_balancing",
        mamba.wrap_load_balancing,
        _ALL,
        "contiguous tokens are in order already",
    ),
    PatchPoint(
        "megatron.core.ssm.mamba_context_parallel._redo_attention_load_balancing",
        mamba.wrap_load_balancing,
        _ALL,
        "contiguous tokens stay in order",
    ),
    PatchPoint(
        "megatron.core.pipeline_parallel.schedules.forward_step_calc_loss",
        loss.wrap_forward_step_calc_loss,
        _0_19,
        "the loss is averaged over all tokens of the axis, not over ranks",
    ),
    PatchPoint(
        "megatron.core.pipeline_parallel.schedules.forward_step_calc_loss",
        lambda original: loss.wrap_expert_loss_scale(loss.wrap_forward_step_calc_loss(original)),
        _BEFORE_0_19,
        "the loss is averaged over all tokens of the axis, not over ranks; with "
        "--calculate-per-token-loss so are the losses of a mixture of experts",
    ),
    PatchPoint(
        "megatron.core.models.gpt.gpt_model.GPTModel.__init__",
        spec.wrap_gpt_model_init,
        _ALL,
        "puts our core attention into the layer specs and audits the built model",
    ),
    PatchPoint(
        "megatron.core.models.hybrid.hybrid_model.HybridModel.__init__",
        spec.wrap_hybrid_model_init,
        _HYBRID,
        "puts our core attention into the stack spec and audits the built model",
    ),
    PatchPoint(
        "megatron.core.models.mamba.mamba_model.MambaModel.__init__",
        spec.wrap_mamba_model_init,
        _MAMBA,
        "puts our core attention into the stack spec and audits the built model",
    ),
    PatchPoint(
        "megatron.core.transformer.transformer_layer.TransformerLayer.forward",
        recompute.wrap_layer_forward,
        _ALL,
        "recomputes a layer without repeating attention, or its norms, when asked",
    ),
    PatchPoint(
        "megatron.core.ssm.mamba_layer.MambaLayer.forward",
        recompute.wrap_layer_forward,
        _ALL,
        "recomputes the Mamba layers of a hybrid model with its others, when asked",
    ),
    PatchPoint(
        "megatron.core.transformer.moe.moe_utils.topk_routing_with_score_function",
        recompute_parts.wrap_topk_routing,
        since("0.18"),
        "a token's experts are added up in one order, whether its layer runs for the first time or "
        "again",
    ),
    PatchPoint(
        "megatron.core.transformer.mlp.MLP.__init__",
        mlp.wrap_mlp_init,
        _ALL,
        "refuses, when the model is built, what MLPs in pieces do not go together with",
    ),
    PatchPoint(
        "megatron.core.transformer.mlp.MLP.forward",
        mlp.wrap_mlp_forward,
        _ALL,
        "computes MLPs in pieces of the sequence, and again in backward, when asked",
    ),
    PatchPoint(
        "megatron.core.transformer.transformer_layer.TransformerLayer._forward_mlp",
        mlp.wrap_forward_mlp,
        _ALL,
        "a recomputed layer does not compute an MLP's output that nobody reads",
    ),
    PatchPoint(
        "megatron.core.transformer.dot_product_attention.DotProductAttention.__init__",
        spec.wrap_stock_attention_init,
        _ALL,
        "refuses a stock core attention while the axis is active",
    ),
    PatchPoint(
        "megatron.core.extensions.transformer_engine.TEDotProductAttention.__init__",
        spec.wrap_stock_attention_init,
        _ALL,
        "refuses a stock core attention while the axis is active",
        optional=True,
    ),
    PatchPoint(
        "megatron.training.training.train",
        steps.wrap_train,
        _ALL,
        "training ends with its closing summary, and its report if asked for",
        optional=True,
    ),
    PatchPoint(
        "megatron.training.training.train_step",
        steps.wrap_train_step,
        _ALL,
        "the report, the trace and the TensorBoard scalars measure each step, if asked for",
        optional=True,
    ),
    PatchPoint(
        "megatron.core.pipeline_parallel.schedules.forward_step",
        steps.wrap_forward_step,
        _ALL,
        "the trace marks micro-batches, if asked for",
    ),
    PatchPoint(
        "megatron.core.pipeline_parallel.schedules.backward_step",
        steps.wrap_backward_step,
        _ALL,
        "the trace marks micro-batches, if asked for",
    ),
)
