# SPDX-License-Identifier: Apache-2.0
"""Every refused combination, from the table and through Megatron's own parser."""

from __future__ import annotations

import argparse
import types

import pytest

from megatron_seqpar.config import SeqParConfig
from megatron_seqpar.errors import UnsupportedError
from megatron_seqpar.integration import lengths, refusals, state
from megatron_seqpar.integration.refusals_by_setting import BY_SETTING, refuse_by_setting

ROWS = tuple(refusals.REFUSALS)
CONDITIONAL = [(name, row) for name, table in BY_SETTING.items() for row in table]
WRONG = {
    "recompute_granularity": "full",
    "recompute_activations": True,
    "fp8": "hybrid",
    "fp4": "e2m1",
    "cpu_offloading_num_layers": 2,
    "moe_layer_recompute": True,
    "moe_paged_stash": True,
    "distribute_saved_activations": True,
    "context_parallel_size": 2,
    "hierarchical_context_parallel_sizes": [2, 2],
    "hybrid_context_parallel": True,
    "yaml_cfg": "model.yaml",
    "sft": True,
    "dataloader_inter_document_masking": True,
    "reset_attention_mask": True,
    "micro_batch_size": 2,
    "perform_rl_step": True,
    "vision_pretraining": True,
    "attention_dropout": 0.1,
    "qk_clip": True,
    "log_max_attention_logit": True,
    "window_size": (128,),
    "position_embedding_type": "relative",
    "experimental_attention_variant": "dsa",
    "hybrid_layer_pattern": "M*MG",
    "rope_type": "yarn",
    "cache_mla_latents": True,
    "use_kitchen_attention": True,
    "fp8_dot_product_attention": True,
    "fp8_multi_head_attention": True,
    "batch_invariant_mode": True,
    "overlap_moe_expert_parallel_comm": True,
    "cuda_graph_impl": "full_iteration",
    "cuda_graph_scope": ["full_iteration"],
    "defer_embedding_wgrad_compute": True,
    "fp8_output_proj": True,
    "config_logger_dir": "logs",
    "logits_save_dir": "teacher",
    "logits_load_dir": "teacher",
    "export_kd_teacher_load": "teacher",
    "enable_cuda_graph": True,
    "external_cuda_graph": True,
    "use_megatron_fsdp": True,
    "use_torch_fsdp2": True,
    "fine_grained_activation_offloading": True,
    "inprocess_restart": True,
    "use_tp_pp_dp_mapping": True,
    "gtp_weight_remat_size": 2,
    "tp_comm_overlap": True,
    "delay_wgrad_compute": True,
    "mlp_chunks_for_training": 2,
    "recompute_modules": ["core_attn", "mlp"],
    "use_transformer_engine_op_fuser": True,
    "use_kitchen": True,
    "num_experts": 8,
}
NEEDED = {
    "micro_batch_size": {
        "dataloader_inter_document_masking": True,
        "pipeline_model_parallel_size": 2,
    },
    "rope_type": {"multi_latent_attention": True, "apply_rope_fusion": True},
    "use_tp_pp_dp_mapping": {"pipeline_model_parallel_size": 2},
}
"""What a row's further condition wants to see."""

RIGHT = {
    "micro_batch_size": 1,
    "rope_type": "rope",
    "context_parallel_size": 1,
    "attention_dropout": 0.0,
    "window_size": (128, -1),
    "position_embedding_type": "rope",
    "hybrid_layer_pattern": "M*M-E",
    "cuda_graph_impl": "none",
    "gtp_weight_remat_size": 1,
}


@pytest.fixture(autouse=True)
def settings():
    state.set_config(SeqParConfig(sequence_parallel_size=2))
    yield
    state.set_config(SeqParConfig())


def test_every_row_has_a_case():
    attributes = {row.attribute for row in ROWS} | {row.attribute for _, row in CONDITIONAL}
    assert attributes == WRONG.keys()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.flag)
def test_row_names_flag_value_and_alternative(row):
    value = WRONG[row.attribute]
    source = types.SimpleNamespace(**{row.attribute: value}, **NEEDED.get(row.attribute, {}))
    with pytest.raises(UnsupportedError) as caught:
        refusals.refuse(source, "--sequence-parallel-size 2", row.scopes[0], table=ROWS)
    text = str(caught.value)
    assert row.flag in text
    assert str(value) in text
    assert "--sequence-parallel-size 2" in text
    assert row.alternative in text


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.flag)
def test_row_passes_what_is_fine(row):
    for value in (RIGHT.get(row.attribute, False), None):
        source = types.SimpleNamespace(**{row.attribute: value}, **NEEDED.get(row.attribute, {}))
        refusals.refuse(source, "--sequence-parallel-size 2", row.scopes[0], table=ROWS)


def test_unfused_rotary_embedding_of_latent_attention_is_fine():
    source = types.SimpleNamespace(
        rope_type="yarn", multi_latent_attention=True, apply_rope_fusion=False
    )
    refusals.refuse(source, "--sequence-parallel-size 2", refusals.ARGUMENTS)


def test_fused_rotary_embedding_of_latent_attention_is_fine_in_the_order_it_assumes():
    source = types.SimpleNamespace(
        rope_type="yarn", multi_latent_attention=True, apply_rope_fusion=True
    )
    with pytest.raises(UnsupportedError, match="--rope-type yarn"):
        refusals.refuse(source, "--sequence-parallel-size 2", refusals.ARGUMENTS)
    state.set_config(SeqParConfig(sequence_parallel_size=2, token_layout="zigzag"))
    refusals.refuse(source, "--sequence-parallel-size 2", refusals.ARGUMENTS)


@pytest.mark.parametrize(
    ("more", "refused"),
    [
        ({"sft": True, "num_experts": 4}, True),
        ({"sft": True, "pipeline_model_parallel_size": 2}, True),
        ({"sft": True, "dataloader_inter_document_masking": False}, False),
        ({"num_experts": 4, "pipeline_model_parallel_size": 2}, False),
        ({"reset_attention_mask": True, "pipeline_model_parallel_size": 2}, False),
    ],
)
def test_several_samples_are_packed_into_one(more, refused):
    values = {"micro_batch_size": 2, "dataloader_inter_document_masking": False, **more}
    source = types.SimpleNamespace(**values)
    if refused:
        with pytest.raises(UnsupportedError, match=r"--micro-batch-size 2 with.*Set --micro"):
            refusals.refuse(source, "--sequence-parallel-size 2", refusals.ARGUMENTS)
    else:
        refusals.refuse(source, "--sequence-parallel-size 2", refusals.ARGUMENTS)


def test_all_reasons_are_told_at_once():
    source = types.SimpleNamespace(sft=True, attention_dropout=0.1)
    with pytest.raises(UnsupportedError, match=r"(?s)--sft.*--attention-dropout"):
        refusals.refuse(source, "--sequence-parallel-size 2", refusals.ARGUMENTS)


SETTINGS = {
    "recompute": "attention-output",
    "mask": "prefix:64",
    "token_layout": "zigzag",
    "loss_chunks": "4",
    "mlp_chunks": "4",
}
"""A value of each setting with a table that is not its default."""


@pytest.mark.parametrize(("setting", "row"), CONDITIONAL, ids=lambda it: getattr(it, "flag", it))
def test_rows_of_a_setting_apply_with_it_only(setting, row):
    value = WRONG[row.attribute]
    source = types.SimpleNamespace(**{row.attribute: value})
    refuse_by_setting(source, SeqParConfig(sequence_parallel_size=2), row.scopes[0])
    asked = SeqParConfig(sequence_parallel_size=2, **{setting: SETTINGS[setting]})
    with pytest.raises(UnsupportedError) as caught:
        refuse_by_setting(source, asked, row.scopes[0])
    text = str(caught.value)
    assert text.startswith(f"{row.flag} {value} with --seqpar-")
    assert SETTINGS[setting] in text
    assert row.alternative in text
    setattr(source, row.attribute, None)
    refuse_by_setting(source, asked, row.scopes[0])


@pytest.mark.parametrize(
    ("values", "refused"),
    [
        ({"num_experts": 8, "moe_layer_freq": 1}, True),
        ({"num_experts": 8, "moe_layer_freq": [1, 1]}, True),
        ({"num_experts": 8, "moe_layer_freq": 2}, False),
        ({"num_experts": 8, "moe_layer_freq": [0, 1]}, False),
        ({"num_experts": 8, "seqpar_mlp_chunks": "auto"}, False),
        ({"num_experts": 8, "moe_shared_expert_intermediate_size": 64}, False),
        (
            {
                "num_experts": 8,
                "moe_shared_expert_intermediate_size": 64,
                "moe_shared_expert_overlap": True,
            },
            True,
        ),
        ({"num_experts": 8, "hybrid_layer_pattern": "M-E*"}, False),
        ({"num_experts": 8, "hybrid_layer_pattern": "ME*"}, True),
        ({"hybrid_layer_pattern": "M*"}, True),
        ({"num_experts": None, "hybrid_layer_pattern": None}, False),
    ],
)
def test_pieces_of_mlps_want_an_mlp(values, refused):
    source = types.SimpleNamespace(**{"seqpar_mlp_chunks": "4", **values})
    asked = SeqParConfig(mlp_chunks=source.seqpar_mlp_chunks)
    if refused:
        with pytest.raises(UnsupportedError, match=r"with --seqpar-mlp-chunks 4: .* Use --"):
            refuse_by_setting(source, asked, refusals.ARGUMENTS)
    else:
        refuse_by_setting(source, asked, refusals.ARGUMENTS)


@pytest.mark.parametrize(("recompute", "refused"), [("mlp", True), ("attention-output", False)])
def test_mlps_that_are_only_recomputed_have_the_refusals_of_pieces(recompute, refused):
    source = types.SimpleNamespace(tp_comm_overlap=True, num_experts=8)
    asked = SeqParConfig(recompute=recompute)
    if refused:
        with pytest.raises(UnsupportedError) as caught:
            refuse_by_setting(source, asked, refusals.ARGUMENTS)
        text = str(caught.value)
        assert text.startswith(f"--tp-comm-overlap True with --seqpar-recompute {recompute}")
        assert "--num-experts" not in text
    else:
        refuse_by_setting(source, asked, refusals.ARGUMENTS)


def test_scopes_keep_apart_what_a_model_config_cannot_know():
    source = types.SimpleNamespace(sft=True)
    refusals.refuse(source, "--sequence-parallel-size 2", refusals.CONFIG)


@pytest.mark.parametrize(
    ("length", "size", "tensor", "text"),
    [
        (3, 4, 1, "--seq-length 3 with --sequence-parallel-size 4: the sequence is shorter"),
        (257, 2, 1, "nearest lengths that work: 256 or 258"),
        (258, 2, 4, "over 4 tensor ranks.*nearest lengths that work: 256 or 264"),
        (5, 4, 1, "nearest lengths that work: 4 or 8"),
    ],
)
def test_lengths_that_do_not_split(length, size, tensor, text):
    with pytest.raises(UnsupportedError, match=text):
        lengths.check_sequence_length(length, size, tensor)


@pytest.mark.parametrize(
    ("length", "size", "tensor", "text"),
    [
        (255, 3, 1, r"6 chunks, two a rank.*nearest lengths that work: 252 or 258"),
        (258, 2, 4, "nearest lengths that work: 256 or 264"),
        (6, 4, 1, "nearest lengths that work: 8"),
    ],
)
def test_lengths_that_do_not_split_in_pairs(length, size, tensor, text):
    with pytest.raises(UnsupportedError, match=text):
        lengths.check_sequence_length(length, size, tensor, zigzag=True)


@pytest.mark.parametrize(
    ("length", "size", "tensor", "zigzag"),
    [(255, 3, 1, False), (4, 4, 1, False), (264, 2, 4, False), (252, 3, 2, True), (36, 2, 3, True)],
)
def test_lengths_that_split(length, size, tensor, zigzag):
    lengths.check_sequence_length(length, size, tensor, zigzag=zigzag)


def test_world_size_is_refused_with_the_numbers():
    lengths.check_world_size(12, 3, 2, 2)
    with pytest.raises(UnsupportedError, match=r"multiple of 12 processes, but 16.*Start 12 or 24"):
        lengths.check_world_size(16, 3, 2, 2)
    with pytest.raises(UnsupportedError, match=r"multiple of 4 processes, but 3.*Start 4"):
        lengths.check_world_size(3, 4, 1, 1)


def parser(monkeypatch, world):
    """A parser with a few of Megatron's flags, wrapped as Megatron's own is."""
    pytest.importorskip("megatron.training")  # the parsed settings ask for a summary of training
    from megatron_seqpar.integration import arguments

    def stock(parser):
        parser.add_argument("--context-parallel-size", type=int, default=1)
        parser.add_argument("--tensor-model-parallel-size", type=int, default=1)
        parser.add_argument("--pipeline-model-parallel-size", type=int, default=1)
        parser.add_argument("--attention-dropout", type=float, default=0.1)
        parser.add_argument("--use-checkpoint-args", action="store_true")
        return parser

    monkeypatch.setenv("WORLD_SIZE", str(world))
    return arguments.wrap_add_megatron_arguments(stock)(argparse.ArgumentParser(allow_abbrev=False))


def test_parsing_folds_the_axis_into_context_parallelism(monkeypatch):
    argv = ["--sequence-parallel-size", "4", "--attention-dropout", "0"]
    args = parser(monkeypatch, 8).parse_args(argv)
    assert args.context_parallel_size == args.sequence_parallel_size == 4
    assert state.config().sequence_parallel_size == 4
    assert all(
        value is None or type(value) in (int, float, str, bool) for value in vars(args).values()
    )


def test_parsing_without_the_flag_changes_no_stock_value(monkeypatch):
    state.set_config(SeqParConfig())
    args = parser(monkeypatch, 8).parse_args(["--context-parallel-size", "2"])
    assert args.context_parallel_size == 2
    assert args.attention_dropout == 0.1
    assert not state.active()


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--context-parallel-size", "2"], "Drop --context-parallel-size"),
        (["--attention-dropout", "0.5"], "--attention-dropout 0.5"),
        (["--seqpar-kernel", "abacus"], r"--seqpar-kernel abacus: unknown.*reference"),
        (["--tensor-model-parallel-size", "3"], "multiple of 6 processes, but 8"),
    ],
)
def test_parsing_refuses(monkeypatch, argv, text):
    argv = ["--sequence-parallel-size", "2", "--attention-dropout", "0", *argv]
    with pytest.raises(UnsupportedError, match=text):
        parser(monkeypatch, 8).parse_args(argv)


def test_what_a_checkpoint_decides_is_judged_after_it_is_read(monkeypatch):
    argv = ["--sequence-parallel-size", "3", "--use-checkpoint-args"]
    assert parser(monkeypatch, 8).parse_args(argv).attention_dropout == 0.1
    with pytest.raises(UnsupportedError, match="Drop --context-parallel-size"):
        parser(monkeypatch, 8).parse_args([*argv, "--context-parallel-size", "2"])


@pytest.mark.parametrize("length", [252, 256])
def test_validation_accepts_odd_shares(length):
    """Stock validation wants two chunks a rank; one is enough here, and the length survives."""
    from megatron_seqpar.integration import arguments

    def stock(args):
        assert args.seq_length % (2 * args.context_parallel_size) == 0
        args.encoder_seq_length = args.seq_length
        return args

    state.set_config(SeqParConfig(sequence_parallel_size=4))
    args = types.SimpleNamespace(
        context_parallel_size=4,
        seq_length=length,
        encoder_seq_length=None,
        sequence_parallel=False,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        max_position_embeddings=length,
        world_size=8,
    )
    result = arguments.wrap_validate_args(stock)(args)
    assert result.seq_length == result.encoder_seq_length == length
