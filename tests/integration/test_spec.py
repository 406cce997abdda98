# SPDX-License-Identifier: Apache-2.0
"""Rewriting layer specs, and the audit of what was built from them."""

from __future__ import annotations

import collections
import functools

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_seqpar.config import SeqParConfig
from megatron_seqpar.errors import KernelError, UnsupportedError
from megatron_seqpar.integration import axis as parallel_axis
from megatron_seqpar.integration import install, state, uninstall

ps = pytest.importorskip("megatron.core.parallel_state")

from megatron.core.models.gpt import gpt_layer_specs  # noqa: E402
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402
from megatron.core.transformer.dot_product_attention import DotProductAttention  # noqa: E402
from megatron.core.transformer.spec_utils import ModuleSpec  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from megatron_seqpar.integration.core_attention import SeqParCoreAttention  # noqa: E402
from megatron_seqpar.integration.spec import audit, with_seqpar_attention  # noqa: E402


@pytest.fixture
def axis_of_two():
    """Rank 0 of an axis of two that only this process simulates."""
    install(SeqParConfig(sequence_parallel_size=2))
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    ps.initialize_model_parallel(create_gloo_process_groups=False)
    yield
    ps.destroy_model_parallel()
    dist.destroy_process_group()
    uninstall()


def config(**options):
    values = {
        "num_layers": 2,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "use_cpu_initialization": True,
        "context_parallel_size": 2,
    }
    return TransformerConfig(**{**values, **options})


def model(spec, cfg, **options):
    return GPTModel(cfg, spec, vocab_size=32, max_sequence_length=8, **options)


def attentions(spec):
    """Every core attention in a spec, by walking its representation."""
    found = []

    def walk(node):
        if isinstance(node, (list, tuple)):
            for part in node:
                walk(part)
        elif isinstance(node, functools.partial):
            walk(node.keywords)
        elif isinstance(node, dict):
            for name, part in node.items():
                found.append(part) if name == "core_attention" else walk(part)
        elif hasattr(node, "__dataclass_fields__") and not isinstance(node, type):
            walk(vars(node))

    walk(spec)
    return found


def specs():
    layer = gpt_layer_specs.get_gpt_layer_local_spec()
    moe = gpt_layer_specs.get_gpt_layer_local_spec(num_experts=4)
    cfg = config(
        context_parallel_size=1, num_moe_experts=4, mtp_num_layers=1, add_bias_linear=False
    )
    block = gpt_layer_specs.get_gpt_decoder_block_spec(cfg, use_transformer_engine=False)
    mtp = gpt_layer_specs.get_gpt_mtp_block_spec(cfg, moe, use_transformer_engine=False)
    return {"layer": layer, "moe": moe, "block": block, "mtp": mtp, "list": [layer, moe]}


@pytest.mark.parametrize("name", ["layer", "moe", "block", "mtp", "list"])
def test_stock_attention_is_swapped_in_a_copy(axis_of_two, name):
    spec = specs()[name]
    before = attentions(spec)
    assert before
    assert set(before) == {DotProductAttention}
    after = attentions(with_seqpar_attention(spec))
    assert after == [SeqParCoreAttention] * len(before)
    assert attentions(spec) == before


def test_other_shapes_of_a_spec():
    class Other(torch.nn.Module):
        pass

    Pair = collections.namedtuple("Pair", ["core_attention", "rest"])
    assert with_seqpar_attention({"core_attention": DotProductAttention}) == {
        "core_attention": SeqParCoreAttention
    }
    part = functools.partial(print, core_attention=ModuleSpec(module=DotProductAttention))
    assert with_seqpar_attention(part).keywords == {"core_attention": SeqParCoreAttention}
    bound = functools.partial(DotProductAttention, attention_dropout=0.0)
    assert with_seqpar_attention({"core_attention": bound})["core_attention"] is SeqParCoreAttention
    assert with_seqpar_attention({"core_attention": Other}) == {"core_attention": Other}
    assert with_seqpar_attention(Pair(1, [2])) == Pair(1, [2])


def test_model_is_built_with_our_attention_and_no_new_state(axis_of_two):
    spec = gpt_layer_specs.get_gpt_layer_local_spec()
    built = model(spec, config())
    assert audit(built) == 2
    assert not any("core_attention" in name for name in built.state_dict())
    uninstall()
    stock = model(spec, config(context_parallel_size=1))
    install(SeqParConfig(sequence_parallel_size=2))
    assert built.state_dict().keys() == stock.state_dict().keys()


def test_multi_token_prediction_layers_are_covered(axis_of_two):
    spec = gpt_layer_specs.get_gpt_layer_local_spec()
    cfg = config(mtp_num_layers=1)
    mtp = gpt_layer_specs.get_gpt_mtp_block_spec(cfg, spec, use_transformer_engine=False)
    assert audit(model(spec, cfg, mtp_block_spec=mtp)) == 3


def test_unknown_attention_is_refused_by_name(axis_of_two):
    class LocalOnly(torch.nn.Module):
        def __init__(self, *args, **kwargs):
            super().__init__()

    spec = gpt_layer_specs.get_gpt_layer_local_spec()
    spec.submodules.self_attention.submodules.core_attention = LocalOnly
    with pytest.raises(
        UnsupportedError, match=r"2 modules.*self_attention\.core_attention \(LocalOnly\)"
    ):
        model(spec, config())


def test_stock_attention_cannot_be_built_behind_our_back(axis_of_two):
    from megatron.core.transformer.enums import AttnMaskType

    with pytest.raises(UnsupportedError, match="builds DotProductAttention"):
        DotProductAttention(config(context_parallel_size=1), 1, AttnMaskType.causal, "self")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"attention_dropout": 0.1}, "--attention-dropout 0.1"),
        ({"window_size": (4,)}, "--window-size"),
    ],
)
def test_model_configs_are_refused_without_a_command_line(axis_of_two, options, text):
    spec = gpt_layer_specs.get_gpt_layer_local_spec()
    with pytest.raises(UnsupportedError, match=text):
        model(spec, config(**options))


@pytest.mark.parametrize("kind", ["vanilla", "off-by-one", "learnable"])
def test_softmax_offsets_are_those_of_stock_attention(axis_of_two, monkeypatch, kind):
    """Same draws, same parameters, same checkpoint entries."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    spec = gpt_layer_specs.get_gpt_layer_local_spec()
    metadata = {"dp_cp_group": ps.get_data_parallel_group(with_context_parallel=True)}
    built = {}
    for size in (2, 1):
        torch.manual_seed(7)
        uninstall()
        install(SeqParConfig(sequence_parallel_size=size))
        if size == 2:
            parallel_axis.build([(0, 1)], 1.0)
        built[size] = model(spec, config(softmax_type=kind, context_parallel_size=size))
    ours, stock = (built[size].decoder.layers[1].self_attention.core_attention for size in (2, 1))
    assert type(stock) is DotProductAttention
    assert type(ours) is SeqParCoreAttention
    if kind == "vanilla":
        assert ours.softmax_offset is stock.softmax_offset is None
    else:
        assert type(ours.softmax_offset) is type(stock.softmax_offset)
        assert torch.equal(ours.softmax_offset, stock.softmax_offset)
    saved = [module.sharded_state_dict("x.", (), metadata) for module in (ours, stock)]
    assert saved[0].keys() == saved[1].keys()
    assert len(saved[0]) == (kind == "learnable")
    for key, entry in saved[0].items():
        same = saved[1][key]
        assert (entry.key, entry.global_shape, entry.global_offset, entry.replica_id) == (
            same.key,
            same.global_shape,
            same.global_offset,
            same.replica_id,
        )
    assert built[2].state_dict().keys() == built[1].state_dict().keys()
    pairs = zip(built[2].parameters(), built[1].parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"kernel": "cpu", "softcap": 30.0}, "--seqpar-kernel cpu with --seqpar-softcap 30.0: .*"),
        ({"kernel": "flash2"}, "--seqpar-kernel flash2: "),
    ],
)
def test_a_kernel_that_cannot_serve_the_model_is_refused_when_it_is_built(
    axis_of_two, settings, text
):
    state.set_config(SeqParConfig(sequence_parallel_size=2, **settings))
    with pytest.raises(KernelError, match=text + ".*use one of auto.*reference"):
        model(gpt_layer_specs.get_gpt_layer_local_spec(), config())


def test_size_one_leaves_the_spec_alone(axis_of_two):
    uninstall()
    install(SeqParConfig())
    stock = model(gpt_layer_specs.get_gpt_layer_local_spec(), config(context_parallel_size=1))
    kinds = {type(layer.self_attention.core_attention) for layer in stock.decoder.layers}
    assert kinds == {DotProductAttention}


def test_named_kernel_at_size_one_uses_our_attention(axis_of_two):
    uninstall()
    install(SeqParConfig(kernel="cpu"))
    built = model(gpt_layer_specs.get_gpt_layer_local_spec(), config(context_parallel_size=1))
    assert audit(built) == 2


def test_exported_spec_holds_our_attention(axis_of_two):
    from megatron_seqpar.integration.spec import seqpar_layer_spec

    cfg = config(normalization="RMSNorm", transformer_impl="local")
    spec = seqpar_layer_spec(cfg)
    assert set(attentions(spec)) == {SeqParCoreAttention}
    assert audit(model(spec, cfg)) == 2
