# SPDX-License-Identifier: Apache-2.0
"""What the tests of fused parts run in a process of its own: models built of the stand-ins.

    PYTHONPATH=tests/integration/fused_stand_ins/te python -m tests.integration.fused_parts te

Megatron looks for Transformer Engine and Apex once, when it is imported. Prints a JSON object.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_seqpar import cpu_runtime
from megatron_seqpar.config import SeqParConfig

LENGTH, BATCH, VOCABULARY = 12, 2, 32
RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "pieces": {"mlp_chunks": "3"},
    "mlp": {"recompute": "mlp"},
    "attention-qkv": {"recompute": "attention-qkv"},
    "attention-qkv in pieces": {"recompute": "attention-qkv", "mlp_chunks": "3"},
    "attention-output": {"recompute": "attention-output"},
    "all": {"recompute": "attention-output", "mlp_chunks": "3", "loss_chunks": "3"},
}


def config(size: int, **options: Any) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    values: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 16,
        "ffn_hidden_size": 24,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "use_cpu_initialization": True,
        "params_dtype": torch.float64,
        "pipeline_dtype": torch.float64,
        "bias_dropout_fusion": False,
        "bias_activation_fusion": False,
        "apply_rope_fusion": False,
        "context_parallel_size": size,
        "qk_layernorm": True,
    }
    return TransformerConfig(**{**values, **options})


def groups(size: int) -> None:
    """Megatron's groups on rank 0 of a world that only this process simulates."""
    from megatron.core import parallel_state as ps

    if ps.model_parallel_is_initialized():
        ps.destroy_model_parallel()
        dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    ps.initialize_model_parallel(context_parallel_size=size, create_gloo_process_groups=False)


def build(spec: Any, made: Any) -> Any:
    """A GPT of a spec, its weights drawn from one seed."""
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    torch.manual_seed(5)
    model_parallel_cuda_manual_seed(5)
    return GPTModel(
        made, spec, VOCABULARY, LENGTH, position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )  # fmt: skip


def spec_of(engine: bool, made: Any) -> Any:
    """Megatron's own layer spec: of Transformer Engine, or local."""
    from megatron.core.models.gpt import gpt_layer_specs

    return gpt_layer_specs.get_gpt_decoder_block_spec(
        made, use_transformer_engine=engine, normalization=made.normalization
    )


def parts(model: Any) -> dict[str, str]:
    """The modules of the first layer and the final norm by name: class and its base."""
    layer = model.decoder.layers[0]
    attention = layer.self_attention
    named = {
        "input_layernorm": layer.input_layernorm,
        "linear_qkv": attention.linear_qkv,
        "q_layernorm": attention.q_layernorm,
        "k_layernorm": attention.k_layernorm,
        "core_attention": attention.core_attention,
        "linear_proj": attention.linear_proj,
        "pre_mlp_layernorm": layer.pre_mlp_layernorm,
        "linear_fc1": layer.mlp.linear_fc1,
        "linear_fc2": layer.mlp.linear_fc2,
        "final_layernorm": model.decoder.final_layernorm,
    }
    return {name: type(module).__name__ for name, module in named.items()}


def settle(**settings: Any) -> None:
    from megatron_seqpar.integration import install, state, uninstall

    uninstall()
    install(SeqParConfig(**settings))
    state.set_config(SeqParConfig(**settings))


def step(model: Any, calls: Counter[str]) -> dict[str, Any]:
    """Loss, gradients by name, and what was called in forward and in backward."""
    torch.manual_seed(9)
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH))
    labels = torch.randint(VOCABULARY, (BATCH, LENGTH))
    positions = torch.arange(LENGTH).expand(BATCH, LENGTH)
    calls.clear()
    loss = model(tokens, positions, None, labels=labels)
    forward = dict(calls)
    loss.sum().backward()
    return {
        "loss": loss.detach(),
        "gradients": {name: each.grad for name, each in model.named_parameters()},
        "forward": forward,
        "both": dict(calls),
    }


def difference(one: dict[str, Any], other: dict[str, Any], renamed: Any) -> float:
    """The largest difference of losses and gradients, relative to the largest gradient."""
    theirs = {renamed(name): gradient for name, gradient in other["gradients"].items()}
    assert one["gradients"].keys() == theirs.keys(), set(one["gradients"]) ^ set(theirs)
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    worst = float((one["loss"] - other["loss"]).abs().max())
    for name, gradient in one["gradients"].items():
        worst = max(worst, float((gradient - theirs[name]).abs().max()) / largest)
    return worst


def local_name(name: str) -> str:
    """A parameter of a Transformer Engine layer under the name it has in a local one."""
    return (
        name.replace("self_attention.linear_qkv.layer_norm_", "input_layernorm.")
        .replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")
    )  # fmt: skip


def engine() -> dict[str, Any]:
    """Models of Transformer Engine's parts against Megatron's local ones."""
    from transformer_engine.pytorch import calls

    from megatron_seqpar.integration.fused_parts import line

    answer: dict[str, Any] = {"told": line("transformer_engine")}
    normal = {"normalization": "RMSNorm"}
    settle()
    groups(2)
    made = config(2, **normal)
    stock = build(spec_of(True, config(1, **normal)), config(1, **normal))
    answer["stock"] = parts(stock)
    settle(sequence_parallel_size=2)
    groups(2)
    ours = build(spec_of(True, made), made)
    answer["ours"] = parts(ours)
    answer["more state"] = sorted(set(ours.state_dict()) - set(stock.state_dict()))
    answer["less state"] = sorted(set(stock.state_dict()) - set(ours.state_dict()))
    answer["checkpoint"] = sorted(ours.decoder.layers[0].sharded_state_dict("", (), metadata()))
    settle(kernel="reference")
    groups(1)
    made = config(1, **normal)
    reference = build(spec_of(False, made), made)
    start = reference.state_dict()
    truth = step(reference, calls)
    answer["runs"] = {}
    for name, settings in RUNS.items():
        settle(kernel="reference", **settings)
        model = build(spec_of(True, made), made)
        with torch.no_grad():
            for own, parameter in model.named_parameters():
                parameter.copy_(start[local_name(own)])
        found = step(model, calls)
        worst = difference(renamed(found), truth, str)
        answer["runs"][name] = {"worst": worst, "forward": found["forward"], "both": found["both"]}
    return answer


def renamed(found: dict[str, Any]) -> dict[str, Any]:
    gradients = {local_name(name): each for name, each in found["gradients"].items()}
    return {**found, "gradients": gradients}


def metadata() -> dict[str, Any]:
    from megatron.core import parallel_state as ps

    return {"dp_cp_group": ps.get_data_parallel_group(with_context_parallel=True)}


def apex() -> dict[str, Any]:
    """Models of Apex's norm, and the local spec for RMSNorm, which Apex's is not used for.

    A whole model of that stock Megatron does not build: it takes Apex's norm at the end.
    """
    from apex.normalization.fused_layer_norm import calls

    from megatron_seqpar.integration.fused_parts import line
    from megatron_seqpar.integration.spec import with_seqpar_attention

    answer: dict[str, Any] = {"told": line("local"), "runs": {}}
    settle(sequence_parallel_size=2)
    groups(2)
    made = config(2, normalization="LayerNorm")
    answer["LayerNorm"] = parts(build(spec_of(False, made), made))
    settle(kernel="reference")
    groups(1)
    made = config(1, normalization="LayerNorm")
    truth = step(build(spec_of(False, made), made), calls)
    for name, settings in RUNS.items():
        settle(kernel="reference", **settings)
        found = step(build(spec_of(False, made), made), calls)
        worst = difference(found, truth, str)
        entry = {"worst": worst, "forward": found["forward"], "both": found["both"]}
        answer["runs"][name] = entry
    spec = spec_of(False, config(1, normalization="RMSNorm"))
    layer = with_seqpar_attention(spec).layer_specs[0].submodules
    attention = layer.self_attention.submodules
    norms = (layer.input_layernorm, layer.pre_mlp_layernorm, attention.q_layernorm)
    answer["RMSNorm"] = [norm.__name__ for norm in norms]
    return answer


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_default_dtype(torch.float64)  # Apex's norm has its weights in no other
    cpu_runtime.activate()
    print(json.dumps({"te": engine, "apex": apex}[sys.argv[1]]()))
