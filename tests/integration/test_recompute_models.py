# SPDX-License-Identifier: Apache-2.0
"""Models of Megatron with and without recomputation: the same bits, and attention runs once.

Three micro-batches are in flight on two ranks, of the sequence or of tensors, and go back in the
order in which they came, as in a pipeline.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import pytest
import torch

from megatron_seqpar.config import SeqParConfig
from megatron_seqpar.errors import UnsupportedError
from megatron_seqpar.integration import install, offload, recompute_parts, state
from megatron_seqpar.integration.batch import narrow_batch
from megatron_seqpar.memory.offload import Stash
from megatron_seqpar.memory.sizes import Activations
from tests.integration.test_document_models import LATENT, PLAIN, pack
from tests.support.live_bytes import LiveBytes
from tests.support.pool import GlooPool
from tests.support.releases import at_least, hybrid_model, local_hybrid_spec

SIZE, LENGTH, BATCH, VOCABULARY, BATCHES = 2, 16, 2, 32, 3
MODES = ("none", "mlp", "attention-qkv", "attention-output")
EXPERTS: dict[str, Any] = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_router_load_balancing_type": "aux_loss",
    "moe_aux_loss_coeff": 0.1,
    "moe_z_loss_coeff": 0.1,
    "moe_input_jitter_eps": 0.1,
    "moe_token_dispatcher_type": "alltoall",
}
BIASED = {
    "moe_router_load_balancing_type": "none",
    "moe_aux_loss_coeff": 0.0,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
}

BF16 = {"params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model on two ranks: split over the sequence, or over tensors with TP-SP (`tensor` 2)."""

    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    tensor: int = 1
    latent: bool = False
    packed: bool = False
    mtp: int | None = None
    pattern: str | None = None


CASES = {
    "dropout": Case({"hidden_dropout": 0.2, "add_bias_linear": True, "normalization": "RMSNorm"}),
    "tensor": Case({"hidden_dropout": 0.2, "qk_layernorm": True}, tensor=2),
    "residual": Case({"fp32_residual_connection": True, "bf16": True, **BF16}),
    "offset": Case({"softmax_type": "learnable"}),
    "latent": Case(LATENT, latent=True),
    "packed": Case(packed=True),
    "predictions": Case({"calculate_per_token_loss": True}, mtp=1),
    "experts": Case({**EXPERTS, "moe_shared_expert_intermediate_size": 16}),
    "biased experts": Case({**EXPERTS, **BIASED}, tensor=2),
    "many experts": Case({**EXPERTS, "num_moe_experts": 12, "moe_router_topk": 5}),
    "hybrid": Case(EXPERTS, pattern="M*-*E"),
}


class Cast(torch.nn.Module):
    """A norm in fp32 between a residual in fp32 and products in bf16, as Transformer Engine's."""

    def __init__(self, norm: torch.nn.Module) -> None:
        super().__init__()
        self.norm = norm.float()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.norm(hidden.float()).to(torch.bfloat16)


class Mixer(torch.nn.Module):
    """In the place of Mamba's, whose kernels need a GPU."""

    def __init__(self, config: Any, d_model: int, **_: Any) -> None:
        super().__init__()
        self.project = torch.nn.Linear(d_model, d_model)
        self.runs = 0

    def forward(self, hidden: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        self.runs += 1
        return torch.tanh(self.project(hidden)), None


def settle(case: Case, mode: str) -> None:
    """Megatron's groups with these settings, in a worker of the pool."""
    from megatron_seqpar import cpu_runtime

    cpu_runtime.activate()
    config = SeqParConfig(SIZE // case.tensor, kernel="reference", recompute=mode)
    install(config)
    state.set_config(config)
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=case.tensor, context_parallel_size=SIZE // case.tensor
    )


def build(case: Case, mode: str, **options: Any) -> Any:
    """The model, its weights the same whatever is recomputed. options: of the config."""
    settle(case, mode)  # before the first import of Megatron
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    torch.manual_seed(5)
    model_parallel_cuda_manual_seed(5, force_reset_rng=True)
    kind = MLATransformerConfig if case.latent else TransformerConfig
    values: dict[str, Any] = {
        **PLAIN,
        "tensor_model_parallel_size": case.tensor,
        "sequence_parallel": case.tensor > 1,
        "context_parallel_size": SIZE // case.tensor,
        **case.options,
        **options,
    }
    if case.pattern is not None:
        values["num_layers"] = len(case.pattern)
    made = kind(**values, mtp_num_layers=case.mtp)
    sizes = {"vocab_size": VOCABULARY, "max_sequence_length": LENGTH}
    if case.pattern is not None:
        return hybrid_model(
            made, hybrid_spec(), case.pattern, position_embedding_type="rope", **sizes
        )
    spec = gpt_layer_specs.get_gpt_layer_local_spec(
        num_experts=made.num_moe_experts,
        qk_layernorm=made.qk_layernorm,
        multi_latent_attention=case.latent,
        normalization=made.normalization,
    )
    more = {}
    if case.mtp is not None:
        more["mtp_block_spec"] = gpt_layer_specs.get_gpt_mtp_block_spec(made, spec, False)
    model = GPTModel(made, spec, position_embedding_type="rope", **sizes, **more)
    if made.fp32_residual_connection:
        for layer in model.decoder.layers:
            for name in ("input_layernorm", "pre_mlp_layernorm"):
                setattr(layer, name, Cast(getattr(layer, name)))
        model.decoder.final_layernorm = Cast(model.decoder.final_layernorm)
        recompute_parts.prepare(model)
    return model


def hybrid_spec() -> Any:
    """The stack without Transformer Engine, and Mamba layers in it."""
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    spec = local_hybrid_spec()
    spec.submodules.mamba_layer = ModuleSpec(
        module=MambaLayer,
        submodules=MambaLayerSubmodules(
            norm=WrappedTorchNorm, mixer=Mixer, mamba_bda=get_bias_dropout_add
        ),
    )
    return spec


def batch_of(seed: int) -> dict[str, torch.Tensor]:
    """This rank's part of a micro-batch."""
    from megatron.core import parallel_state

    generator = torch.Generator().manual_seed(seed)
    rows = 1 if seed < 0 else BATCH
    tokens = torch.randint(0, VOCABULARY, (2, rows, LENGTH), generator=generator)
    positions = torch.arange(LENGTH).repeat(rows, 1)
    batch = {
        "tokens": tokens[0],
        "labels": tokens[1],
        "position_ids": positions,
        "loss_mask": torch.ones(rows, LENGTH),
    }
    group = parallel_state.get_context_parallel_group()
    return narrow_batch(batch, group) if group.size() > 1 else batch


def loss_of(model: Any, batch: dict[str, torch.Tensor], case: Case) -> torch.Tensor:
    more: dict[str, Any] = {}
    if case.packed:
        more["packed_seq_params"] = pack([5, 11])
    if case.mtp is not None:
        more["loss_mask"] = batch["loss_mask"]
    losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], **more)
    return losses.sum()


def attention_counts(model: Any) -> dict[str, Any]:
    """What attention computed and sent since the model was built."""
    from megatron_seqpar.integration.core_attention import SeqParCoreAttention

    cores = [each for each in model.modules() if isinstance(each, SeqParCoreAttention)]
    transports = {id(core._transport): core._transport.counters for core in cores}
    counts = [counters.as_dict() for counters in transports.values()]
    for counters in transports.values():
        counters.reset()
    return {
        name: sum(each[name] for each in counts)
        for name in ("forward_calls", "backward_calls", "messages", "bytes")
    }


def expert_counts(model: Any) -> dict[str, torch.Tensor]:
    """Losses logged and tokens counted by routers since the last call."""
    from megatron.core.transformer.moe.router import TopKRouter

    if at_least("0.18"):
        from megatron.core.transformer.moe import moe_logging

        metrics = moe_logging.get_moe_metrics_tracker().metrics
        found = {name: entry.values.clone() for name, entry in metrics.items()}
        moe_logging.destroy_moe_metrics_tracker()
    else:
        from megatron.core.transformer.moe import moe_utils

        tracker = moe_utils.get_moe_layer_wise_logging_tracker()
        found = {name: entry["values"].clone() for name, entry in tracker.items()}
        tracker.clear()
    for name, module in model.named_modules():
        if isinstance(module, TopKRouter) and module.enable_expert_bias:
            found[name] = module.local_tokens_per_expert.clone()
    return found


def train(model: Any, case: Case) -> dict[str, Any]:
    """Losses, gradients and counts of three micro-batches in flight."""
    expert_counts(model)
    attention_counts(model)
    # packed batches have one row
    batches = [batch_of(-1 - seed if case.packed else seed) for seed in range(BATCHES)]
    losses = [loss_of(model, batch, case) for batch in batches]
    for loss in losses:
        loss.backward()
    return {
        "losses": {str(n): loss.detach() for n, loss in enumerate(losses)},
        "gradients": {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
        "experts": expert_counts(model),
        "attention": attention_counts(model),
    }


def same(got: dict[str, Any], expected: dict[str, Any]) -> None:
    assert got["attention"] == expected["attention"]
    for what in ("losses", "gradients", "experts"):
        assert got[what].keys() == expected[what].keys()
        for name, value in expected[what].items():
            assert torch.equal(got[what][name], value), (what, name)


class Eager:
    """Lanes of a device that is done with everything at once."""

    def mark(self, lane: str) -> None:
        pass

    def wait(self, lane: str, event: None) -> None:
        pass

    def copy(self, lane: str, into: torch.Tensor, source: torch.Tensor) -> None:
        into.copy_(source)

    def host_buffer(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)


def check_modes(rank: int, case: Case) -> None:
    expected = train(build(case, "none"), case)
    attention_layers = 2 if case.pattern is None else case.pattern.count("*")
    assert expected["attention"]["forward_calls"] >= BATCHES * (attention_layers + (case.mtp or 0))
    assert (expected["attention"]["messages"] > 0) == (case.tensor == 1)
    assert bool(expected["experts"]) == ("num_moe_experts" in case.options)
    for mode in MODES[1:]:
        model = build(case, mode)
        same(train(model, case), expected)
        mixers = [each for each in model.modules() if isinstance(each, Mixer)]
        runs = 2 if mode == "attention-output" else 1
        assert all(mixer.runs == runs * BATCHES for mixer in mixers)
        assert len(mixers) == (case.pattern or "").count("M")


def check_offload(rank: int, case: Case) -> None:
    expected = train(build(case, "none"), case)
    model = build(case, "attention-output")
    stash, original = Stash(torch.device("cpu"), Eager()), offload.parcel_for
    offload.parcel_for = lambda hidden: stash.parcel()
    try:
        same(train(model, case), expected)
    finally:
        offload.parcel_for = original
    tokens = LENGTH // SIZE * BATCH
    with_attention = 4 * tokens * (2 * PLAIN["hidden_size"] + PLAIN["num_attention_heads"])
    layers = case.pattern or "**"
    a_batch = layers.count("*") * with_attention
    a_batch += (len(layers) - layers.count("*")) * 4 * tokens * PLAIN["hidden_size"]
    assert stash.bytes_out == BATCHES * a_batch
    assert 0 < stash.bytes_in <= stash.bytes_out
    assert stash.pool.in_use == 0


def check_full_recomputation_counts_experts_alike(rank: int, case: Case) -> None:
    """Megatron's own full recomputation is what ours is held against where it counts."""
    full = {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }
    stock = train(build(case, "none", **full), case)
    ours = train(build(case, "attention-output"), case)
    assert stock["attention"]["forward_calls"] == 2 * ours["attention"]["forward_calls"]
    for name, value in stock["experts"].items():
        assert torch.equal(ours["experts"][name], value), name


def kept_bytes(case: Case, mode: str, layers: int) -> int:
    """Bytes alive between forward and backward."""
    model = build(case, mode, num_layers=layers)
    batch = batch_of(0)
    loss_of(model, batch, case).backward()  # rotary tables and the like are there from now on
    with LiveBytes([*model.parameters(), *batch.values()]) as watched:
        loss = loss_of(model, batch, case)
    live = watched.live
    loss.backward()
    return live


def check_kept(rank: int, case: Case, expected: dict[str, int]) -> None:
    tokens = LENGTH // SIZE * BATCH
    found = {}
    for mode in MODES:
        two, four = (kept_bytes(case, mode, layers) for layers in (2, 4))
        found[mode], rest = divmod(four - two, 2 * tokens)
        assert rest == 0, (mode, four - two)
    assert {mode: found[mode] for mode in expected} == expected, found
    assert found["none"] > found["mlp"] > found["attention-qkv"] > found["attention-output"]


def documented(norm: int) -> dict[str, int]:
    """Bytes a token and layer in fp32: `memory.sizes`, and the small things that it leaves out.

    norm: numbers that a norm keeps besides its input. The tables of rotary embeddings that are not
    fused come on top: four head sizes a position.
    """
    hidden, heads, groups = (
        PLAIN[name] for name in ("hidden_size", "num_attention_heads", "num_query_groups")
    )
    sizes = Activations(
        tokens=1,
        layers=1,
        element=4,
        hidden=hidden,
        query=hidden,
        key_value=2 * hidden * groups // heads,
        heads=heads,
        mlp_up=4 * hidden,
        mlp_down=4 * hidden,
        vocabulary=0,
    )
    small = dict.fromkeys(MODES, 2 * norm + 4 * (hidden // heads) // BATCH)
    small["attention-output"] = 0
    return {mode: sizes.kept_per_layer(mode) + 4 * small[mode] for mode in MODES}


def check_refused(rank: int) -> None:
    model = build(Case(), "none")

    class Other(torch.nn.Module):
        pass

    model.decoder.layers[1].mlp = Other()
    for mode in ("mlp", "attention-qkv"):
        state.set_config(SeqParConfig(SIZE, recompute=mode))
        with pytest.raises(UnsupportedError, match=rf"{mode}: .*layers\.1\.mlp \(Other\)"):
            recompute_parts.prepare(model)
    full = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    with pytest.raises(UnsupportedError, match="--recompute-granularity selective with --seqpar"):
        build(Case(), "mlp", **full)


def check_stock_attention(rank: int) -> None:
    """At one rank of the axis, a model that no patch rewrites would repeat its attention."""
    settle(Case(tensor=2), "none")
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.transformer.transformer_block import TransformerBlock
    from megatron.core.transformer.transformer_config import TransformerConfig

    spec = gpt_layer_specs.get_gpt_layer_local_spec()
    make = partial(TransformerBlock, TransformerConfig(**PLAIN, tensor_model_parallel_size=2), spec)
    make()
    state.set_config(SeqParConfig(recompute="mlp"))
    make()
    for mode in ("attention-qkv", "attention-output"):
        state.set_config(SeqParConfig(recompute=mode))
        with pytest.raises(UnsupportedError, match=f"--seqpar-recompute {mode}: .*DotProduct"):
            make()


@pytest.fixture(scope="module")
def pool():
    pytest.importorskip("megatron.core")
    workers = GlooPool(SIZE)
    yield workers
    workers.stop()


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_bitwise_equal_and_attention_runs_once(pool, name):
    pool.run(check_modes, CASES[name])


@pytest.mark.parametrize("name", ["dropout", "hybrid"])
def test_nothing_changes_where_what_is_kept_waits(pool, name):
    pool.run(check_offload, CASES[name])


@pytest.mark.parametrize("name", ["experts", "biased experts"])
def test_experts_are_counted_once_as_in_full_recomputation(pool, name):
    pool.run(check_full_recomputation_counts_experts_alike, CASES[name])


@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
def test_a_layer_keeps_what_is_documented(pool, normalization):
    # the mean and the spread; torch's RMSNorm, which is not fused on a CPU, keeps what it scales
    norm = 2 if normalization == "LayerNorm" else 1 + 32
    case = Case({"normalization": normalization})
    pool.run(check_kept, case, documented(norm))


def test_an_unknown_mlp_is_refused(pool):
    pool.run(check_refused)


def test_stock_attention_is_refused_where_its_output_is_to_be_kept(pool):
    pool.run(check_stock_attention)
