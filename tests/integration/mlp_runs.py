# SPDX-License-Identifier: Apache-2.0
"""What tests of MLPs in pieces run on the ranks of a gloo pool: Megatron's MLP and small models.

Truth is the same module of Megatron with the plugin's settings at their defaults. `prepare` puts a
rank under the CPU runtime, where Megatron's CUDA names mean the CPU.
"""

from __future__ import annotations

import contextlib
from collections import Counter

from megatron_seqpar.config import SeqParConfig
from tests.support.releases import hybrid_model, local_hybrid_spec

ROWS, BATCH, WIDTH, INNER = 7, 2, 8, 12
OFF = SeqParConfig()


def prepare(rank):
    """The CPU runtime, Megatron, and the plugin with every setting at its default."""
    from megatron_seqpar import cpu_runtime

    for unit in cpu_runtime.units().values():
        unit.apply()
    from megatron_seqpar.integration import install

    install(OFF)


def seed():
    """Every generator anew: Megatron's, and torch's, which is that of every device here."""
    import torch
    from megatron.core import tensor_parallel

    tensor_parallel.model_parallel_cuda_manual_seed(7)
    torch.manual_seed(7)


@contextlib.contextmanager
def parallel(tensor=1):
    """Megatron's groups over the two ranks."""
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor, create_gloo_process_groups=False
    )
    seed()
    try:
        yield parallel_state.get_tensor_model_parallel_group()
    finally:
        parallel_state.destroy_model_parallel()


@contextlib.contextmanager
def settings(**values):
    """Settings in force for a while."""
    from megatron_seqpar.integration import state

    state.set_config(SeqParConfig(**values))
    try:
        yield
    finally:
        state.set_config(OFF)


def transformer_config(**options):
    import torch
    from megatron.core.transformer.transformer_config import TransformerConfig

    values = {
        "num_layers": 2,
        "hidden_size": WIDTH,
        "ffn_hidden_size": INNER,
        "num_attention_heads": 2,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "use_cpu_initialization": True,
        "params_dtype": torch.float64,
        "bias_dropout_fusion": False,
        "pipeline_dtype": torch.float64,
    }
    return TransformerConfig(**{**values, **options})


def build(config, group=None):
    """Megatron's MLP of the local layer spec, with biases that are not zero."""
    import torch
    from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec
    from megatron.core.transformer.mlp import MLP

    torch.manual_seed(3)
    spec = get_mlp_module_spec(use_te=False)
    submodules = getattr(spec, "submodules", None) or spec.keywords["submodules"]
    mlp = MLP(config, submodules, ffn_hidden_size=config.ffn_hidden_size, tp_group=group)
    for name, parameter in mlp.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return mlp


def inputs(dtype, rows=ROWS):
    import torch

    generator = torch.Generator().manual_seed(1)
    values = torch.randn(2, rows, BATCH, WIDTH, generator=generator, dtype=torch.float64)
    x, gradient = values.to(dtype).unbind()
    return x.clone().requires_grad_(), gradient


def run(mlp, rows=ROWS):
    """Output and all gradients of one forward and backward, with the bias added as layers do."""
    x, gradient = inputs(next(mlp.parameters()).dtype, rows)
    mlp.zero_grad()
    out, bias = mlp(x)
    assert bias is mlp.linear_fc2.bias
    out = out if bias is None else out + bias
    out.backward(gradient)
    gradients = [parameter.grad for parameter in mlp.parameters()]
    mlp.zero_grad()
    return [out.detach(), x.grad, *gradients]


def kinds():
    """Name -> options of the transformer config: activations, with biases and without."""
    import torch
    from torch.nn import functional

    swiglu = {"gated_linear_unit": True, "activation_func": functional.silu}
    geglu = {"gated_linear_unit": True, "activation_func": functional.gelu}
    return {
        "gelu": {"activation_func": functional.gelu},
        "gelu fused": {"activation_func": functional.gelu, "bias_activation_fusion": True},
        "relu squared, no bias": {
            "activation_func": lambda x: torch.square(functional.relu(x)),
            "add_bias_linear": False,
        },
        "swiglu": swiglu,
        "swiglu, no bias": {**swiglu, "add_bias_linear": False},
        "swiglu fused": {**swiglu, "bias_activation_fusion": True, "add_bias_linear": False},
        "geglu": geglu,
    }


def assert_equal(found, expected, what):
    import torch

    for got, right in zip(found, expected, strict=True):
        torch.testing.assert_close(
            got, right, rtol=1e-10, atol=1e-12, msg=lambda text: f"{what}: {text}"
        )


def counting_messages():
    """A mode that counts collectives and the bytes of what they are given."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_iter

    class Messages(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.count, self.bytes = Counter(), Counter()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "c10d":
                name = function._schema.name
                self.count[name] += 1
                tensors = (each for each in tree_iter(args) if isinstance(each, torch.Tensor))
                self.bytes[name] += sum(each.nbytes for each in tensors)
            return function(*args, **(kwargs or {}))

    return Messages()


@contextlib.contextmanager
def fusion():
    """Megatron's gradient-accumulation fusion with its CUDA extension written in torch."""
    import types

    from megatron.core.tensor_parallel import layers

    calls = Counter()

    def accumulate(total_input, grad_output, main_grad):
        calls["wgrad"] += 1
        main_grad.add_(grad_output.t().to(main_grad.dtype) @ total_input.to(main_grad.dtype))

    before = getattr(layers, "fused_weight_gradient_mlp_cuda", None)
    available = layers._grad_accum_fusion_available
    layers.fused_weight_gradient_mlp_cuda = types.SimpleNamespace(wgrad_gemm_accum_fp32=accumulate)
    layers._grad_accum_fusion_available = True
    try:
        yield calls
    finally:
        layers._grad_accum_fusion_available = available
        layers.fused_weight_gradient_mlp_cuda = before


def model(kind, **options):
    """A model of two MLPs: GPT, hybrid, or GPT with shared experts, in fp64, with dropout."""
    import torch
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel

    values = {
        "hidden_dropout": 0.2,
        "num_attention_heads": 2,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": kind == "gpt",
    }
    common = {"vocab_size": 16, "max_sequence_length": ROWS, "position_embedding_type": "rope"}
    if kind == "hybrid":
        config = transformer_config(**{**values, "num_layers": 4, **options})
        return hybrid_model(config, local_hybrid_spec(), "*-*-", **common)
    experts = None
    if kind == "experts":
        experts = 2
        values |= {"num_moe_experts": 2, "moe_shared_expert_intermediate_size": INNER}
        values |= {"moe_router_load_balancing_type": "none", "moe_ffn_hidden_size": INNER}
    config = transformer_config(**{**values, **options})
    spec = get_gpt_layer_local_spec(num_experts=experts)
    return GPTModel(config, spec, **common)


def dense(built):
    """The MLPs of a model that see all tokens."""
    from megatron.core.transformer.mlp import MLP

    return [
        module
        for module in built.modules()
        if isinstance(module, MLP) and not getattr(module.linear_fc1, "is_expert", False)
    ]


def train(kind, change=None, options=None, **chosen):
    """One step: the loss and gradients, and the rows of every call of a dense MLP's fc1.

    change: done to the model before it runs.
    """
    import torch

    with settings(**chosen):
        seed()
        # Norms do not follow params_dtype.
        built = model(kind, **(options or {})).double()
        for index, (name, parameter) in enumerate(sorted(built.named_parameters())):
            generator = torch.Generator().manual_seed(index)
            spread = 0.3 if parameter.dim() > 1 or name.endswith("bias") else 0.0
            with torch.no_grad():
                noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter.copy_(spread * noise + (0.0 if spread else 1.0))
        if change is not None:
            change(built)
        rows = {}
        for index, mlp in enumerate(dense(built)):
            mlp.linear_fc1.register_forward_pre_hook(
                lambda module, given, index=index: rows.setdefault(index, []).append(len(given[0]))
            )
        generator = torch.Generator().manual_seed(5)
        tokens = torch.randint(0, 16, (BATCH, ROWS), generator=generator)
        places = torch.arange(ROWS).expand(BATCH, ROWS)
        mask = torch.ones(ROWS, ROWS, dtype=torch.bool).triu(1)[None, None]
        seed()
        loss = built(tokens, places, mask, labels=tokens.roll(-1, 1))
        loss.mean().backward()
        gradients = {name: parameter.grad for name, parameter in built.named_parameters()}
        return loss.detach(), gradients, [rows[index] for index in sorted(rows)]


def assert_trained_alike(found, expected):
    import torch

    torch.testing.assert_close(found[0], expected[0], rtol=1e-10, atol=1e-12)
    assert found[1].keys() == expected[1].keys()
    for name, right in expected[1].items():
        torch.testing.assert_close(
            found[1][name], right, rtol=1e-9, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}"
        )
