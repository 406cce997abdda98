# SPDX-License-Identifier: Apache-2.0
"""Megatron's own MLP in pieces: its numbers, its gradient hooks, its messages, its forwards.

Truth is the same module of Megatron with the plugin's settings at their defaults. The work runs on
two ranks under the CPU runtime, where Megatron's CUDA names mean the CPU.
"""

from __future__ import annotations

import contextlib
from collections import Counter

import pytest

from megatron_seqpar.config import SeqParConfig
from megatron_seqpar.cpu_runtime.activation import ENVIRONMENT
from tests.integration.runs import launch, trained
from tests.support.pool import GlooPool

ROWS, BATCH, WIDTH, INNER = 7, 2, 8, 12
OFF = SeqParConfig()


@pytest.fixture(scope="module")
def pool():
    with pytest.MonkeyPatch.context() as environment:
        for name, value in ENVIRONMENT.items():
            environment.setenv(name, value)
        workers = GlooPool(2)
    workers.run(prepare, timeout=240.0)
    yield workers
    workers.stop()


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


def every_count(rank):
    with parallel() as group:
        for name, options in kinds().items():
            mlp = build(transformer_config(**options), group)
            expected = run(mlp)
            for count in range(1, ROWS + 2):
                with settings(mlp_chunks=str(count)):
                    assert_equal(run(mlp), expected, (name, count))
            with settings(recompute="mlp"):
                assert_equal(run(mlp), expected, (name, "recomputed"))


def test_every_number_of_pieces_gives_megatrons_numbers(pool):
    pool.run(every_count)


def bf16(rank):
    import torch

    rows = 256
    with parallel() as group:
        options = kinds()["swiglu"]
        rounded = build(transformer_config(params_dtype=torch.bfloat16, **options), group)
        exact = build(transformer_config(**options), group)
        with torch.no_grad():
            for wide, narrow in zip(exact.parameters(), rounded.parameters(), strict=True):
                wide.copy_(narrow)
        x, gradient = (tensor.detach() for tensor in inputs(torch.bfloat16, rows))

        def results(mlp):
            given = x.to(next(mlp.parameters()).dtype, copy=True).requires_grad_()
            mlp.zero_grad()
            out, bias = mlp(given)
            (out + bias).backward(gradient.to(out.dtype))
            return [given.grad, *(parameter.grad for parameter in mlp.parameters())]

        truth = results(exact)

        def errors():
            pairs = zip(results(rounded), truth, strict=True)
            return [((got.double() - right).norm() / right.norm()).item() for got, right in pairs]

        own = errors()
        for count in (2, 16, rows):
            with settings(mlp_chunks=str(count)):
                for got, limit in zip(errors(), own, strict=True):
                    assert got <= 2 * limit, (count, got, limit)


def test_bf16_errors_are_those_of_the_whole(pool):
    pool.run(bf16)


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


def tensor_parallel(rank):
    import torch

    for split in (False, True):
        for name in ("gelu", "swiglu, no bias"):
            with parallel(2) as group:
                config = transformer_config(
                    tensor_model_parallel_size=2, sequence_parallel=split, **kinds()[name]
                )
                mlp = build(config, group)
                x, gradient = inputs(torch.float64)

                def passes(x=x, gradient=gradient, mlp=mlp):
                    """Messages of forward and of backward."""
                    with counting_messages() as forward:
                        out, _ = mlp(x)
                    with counting_messages() as backward:
                        out.backward(gradient)
                    return forward, backward

                expected = run(mlp)
                forward, backward = passes()
                assert forward.count.total() == (2 if split else 1), forward.count
                assert backward.count.total() == (3 if split else 1), backward.count
                for count in range(1, ROWS + 2):
                    with settings(mlp_chunks=str(count)):
                        assert_equal(run(mlp), expected, (split, name, count))
                        ours_forward, ours_backward = passes()
                    pieces = min(count, ROWS)
                    for kind in forward.count | backward.count:
                        assert ours_forward.count[kind] == pieces * forward.count[kind]
                        assert ours_forward.bytes[kind] == forward.bytes[kind]
                        both = forward.count[kind] + backward.count[kind]
                        assert ours_backward.count[kind] == pieces * both
                        both = forward.bytes[kind] + backward.bytes[kind]
                        assert ours_backward.bytes[kind] == both


def test_tensor_parallel_results_and_messages(pool):
    """Backward repeats the forward's messages; a piece costs no byte, only a message of each."""
    pool.run(tensor_parallel)


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


def steps(fused, distributed, count, tensor=1, split=False):
    """Two steps of two micro-batches under Megatron's DDP.

    Returns the buckets' gradients after each step, how often each parameter's hook reported in
    the last micro-batch of each, and the number of fused products.
    """
    import torch
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        param_and_grad_buffer,
    )

    reports, found, hooks = Counter(), [], []
    group_class = param_and_grad_buffer._ParamAndGradBucketGroup
    stock = group_class.register_grad_ready

    def register_grad_ready(self, param, *args):
        reports[names[param]] += 1
        return stock(self, param, *args)

    values = {"mlp_chunks": str(count)} if count else {}
    with parallel(tensor) as group, settings(**values), fusion() as calls:
        config = transformer_config(
            params_dtype=torch.float32,
            gradient_accumulation_fusion=fused,
            tensor_model_parallel_size=tensor,
            sequence_parallel=split,
            **kinds()["swiglu"],
        )
        mlp = build(config, group)
        names = {parameter: name for name, parameter in mlp.named_parameters()}
        model = DistributedDataParallel(
            config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                overlap_grad_reduce=True,
                use_distributed_optimizer=distributed,
                bucket_size=64,
            ),
            mlp,
        )
        group_class.register_grad_ready = register_grad_ready
        try:
            for step in range(2):
                model.zero_grad_buffer()
                for micro in range(2):
                    generator = torch.Generator().manual_seed(10 * step + micro)
                    x = torch.randn(ROWS, BATCH, WIDTH, generator=generator).requires_grad_()
                    with contextlib.nullcontext() if micro else model.no_sync():
                        out, bias = model(x)
                        (out + bias).square().sum().backward()
                    assert all(parameter.grad is None for parameter in names)
                    found.append(x.grad)
                hooks.append(dict(reports))
                reports.clear()
                model.finish_grad_sync()
                found += [parameter.main_grad.clone() for parameter in names]
        finally:
            group_class.register_grad_ready = stock
    return found, hooks, calls["wgrad"]


def data_parallel(rank, fused, distributed, tensor):
    import torch

    expected, hooks, products = steps(fused, distributed, 0, tensor, tensor > 1)
    names = {f"linear_fc{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")}
    # Once a micro-batch, the stock behaviour: one that does not sync reports too and is ignored.
    assert [set(each) for each in hooks] == [names] * 2
    assert products == (8 if fused else 0)
    for count in (1, 3, ROWS):
        found, ours, fused_products = steps(fused, distributed, count, tensor, tensor > 1)
        assert ours == hooks, "hooks report as often as without pieces"
        assert fused_products == count * products
        for got, right in zip(found, expected, strict=True):
            torch.testing.assert_close(got, right, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_gradient_hooks_fire_once_a_parameter_and_micro_batch(pool, fused, distributed, tensor):
    pool.run(data_parallel, fused, distributed, tensor)


def zeroed_stand_in(rank):
    """With zero_out_wgrad the hook adds what autograd passes on, which must then be zeros."""
    import torch

    with parallel() as group, fusion():
        config = transformer_config(
            params_dtype=torch.float32, gradient_accumulation_fusion=True, **kinds()["swiglu"]
        )
        mlp = build(config, group)
        for parameter in mlp.parameters():
            parameter.main_grad = torch.zeros_like(parameter)
            parameter.grad_added_to_main_grad = False
            parameter.zero_out_wgrad = True
        run(mlp)
        expected = [parameter.main_grad.clone() for parameter in mlp.parameters()]
        for parameter in mlp.parameters():
            parameter.main_grad.zero_()
        with settings(mlp_chunks="3"):
            _, _, *passed_on = run(mlp)
        for (name, parameter), gradient in zip(mlp.named_parameters(), passed_on, strict=True):
            if name.endswith("weight"):
                assert parameter.grad_added_to_main_grad
                assert torch.count_nonzero(gradient) == 0
            else:
                assert not parameter.grad_added_to_main_grad
        for got, right in zip(mlp.parameters(), expected, strict=True):
            torch.testing.assert_close(got.main_grad, right)


def test_a_stand_in_reaches_the_hook_as_megatron_made_it(pool):
    pool.run(zeroed_stand_in)


def untouched(rank):
    """What is not cut: routed experts, scaled tokens, and everything while off."""
    import torch

    with parallel() as group:
        mlp = build(transformer_config(), group)
        keys = list(mlp.state_dict())
        sharded = sorted(mlp.sharded_state_dict())
        rows = []
        mlp.linear_fc1.register_forward_pre_hook(lambda module, given: rows.append(len(given[0])))
        x, _ = inputs(torch.float64)
        with settings(mlp_chunks="3"):
            assert list(mlp.state_dict()) == keys
            assert sorted(mlp.sharded_state_dict()) == sharded
            with torch.no_grad():
                mlp(x, per_token_scale=torch.ones(ROWS, BATCH, dtype=torch.float64))
            mlp(x, padding_mask=torch.ones(BATCH, ROWS, dtype=torch.bool))
            assert rows == [ROWS, 3, 2, 2]
            rows.clear()
            mlp.linear_fc1.is_expert = True
            mlp(x)
            mlp.linear_fc1.is_expert = False
            assert rows == [ROWS]
            rows.clear()
            # Validation has the length of training and must fit as well.
            mlp.eval()
            with torch.no_grad():
                mlp(x)
            assert rows == [3, 2, 2]
            mlp.config.inference_fuse_tp_communication = True
            mlp(x)
            assert rows.pop() == ROWS
            mlp.train()
            rows.clear()
        mlp(x)
        assert rows == [ROWS]


def test_what_is_cut_and_what_is_not(pool):
    pool.run(untouched)


def strange_bias(rank):
    import torch

    from megatron_seqpar.errors import SeqParError

    with parallel() as group:
        mlp = build(transformer_config(), group)
        stock = mlp.linear_fc2.forward
        mlp.linear_fc2.forward = lambda given: (stock(given)[0], stock(given)[1] * 2)
        with (
            settings(mlp_chunks="3"),
            pytest.raises(SeqParError, match="an output bias that is not its parameter"),
        ):
            mlp(inputs(torch.float64)[0])


def test_an_output_bias_without_gradient_is_an_error(pool):
    pool.run(strange_bias)


def refused_when_built(rank):
    from megatron_seqpar.errors import UnsupportedError

    with parallel() as group, settings(mlp_chunks="3"):
        config = transformer_config()
        config.delay_wgrad_compute = True
        with pytest.raises(UnsupportedError, match="--delay-wgrad-compute True with --seqpar-mlp"):
            build(config, group)


def test_models_built_in_python_are_refused_too(pool):
    pool.run(refused_when_built)


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
        from megatron.core.models.hybrid.hybrid_model import HybridModel

        from megatron_seqpar.cpu_runtime.hybrid_hooks import local_hybrid_stack_spec

        config = transformer_config(**{**values, "num_layers": 4, **options})
        return HybridModel(config, local_hybrid_stack_spec(), hybrid_layer_pattern="*-*-", **common)
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


KEPT = {"recompute": "attention-output"}


def repeated_layers(rank, kind):
    pieces = [3, 2, 2]
    with parallel():
        expected = train(kind)
        assert expected[2] == [[ROWS]] * 2
        for chosen, calls in (
            ({"mlp_chunks": "3"}, pieces * 2),
            (KEPT, [ROWS] * 2),
            # Not three times, though the layer and the pieces are both repeated.
            ({**KEPT, "mlp_chunks": "3"}, pieces * 2),
            ({**KEPT, "mlp_chunks": "1"}, [ROWS] * 2),
            ({"recompute": "mlp"}, [ROWS] * 2),
            ({"recompute": "mlp", "mlp_chunks": "3"}, pieces * 2),
            ({"recompute": "attention-qkv", "mlp_chunks": "3"}, pieces * 2),
        ):
            found = train(kind, **chosen)
            assert_trained_alike(found, expected)
            assert found[2] == [calls] * 2, chosen
        # Megatron's own full recomputation does not tell: documented.
        stock = {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
        found = train(kind, options=stock, mlp_chunks="3")
        assert_trained_alike(found, expected)
        assert found[2] == [pieces * 3] * 2


@pytest.mark.parametrize("kind", ["gpt", "hybrid"])
def test_no_mlp_runs_forward_a_third_time(pool, kind):
    pool.run(repeated_layers, kind)


def read_outputs(rank):
    """Layers where something reads the MLP's output: it is computed, and gradients are right."""
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.transformer.mlp import MLP
    from megatron.core.transformer.transformer_layer import TransformerLayer

    class Bounded(MLP):
        def forward(self, *args, **kwargs):
            out, bias = super().forward(*args, **kwargs)
            return out.tanh(), bias

    class After(TransformerLayer):
        def _forward_post_mlp(self, given, residual):
            out, bias = given
            return super()._forward_post_mlp((out.tanh(), bias), residual)

    class Around(TransformerLayer):
        def _forward_mlp(self, *args, **kwargs):
            return super()._forward_mlp(*args, **kwargs).tanh()

    def bounded_sum(training, fused):
        stock = get_bias_dropout_add(training, fused)
        return lambda given, *rest: stock((given[0].tanh(), given[1]), *rest)

    def sets(holder, name, value):
        def change(built):
            for layer in built.decoder.layers:
                setattr(layer.mlp if holder == "mlp" else layer, name, value)

        return change

    def hooks(built):
        for layer in built.decoder.layers:
            layer.mlp.register_forward_hook(lambda module, given, out: (out[0].tanh(), out[1]))

    pieces = [3, 2, 2]
    with parallel():
        for name, change in {
            "an MLP's own class": sets("mlp", "__class__", Bounded),
            "after": sets("layer", "__class__", After),
            "around": sets("layer", "__class__", Around),
            "another sum": sets("layer", "mlp_bda", bounded_sum),
            "hooks": hooks,
        }.items():
            expected = train("gpt", change)
            found = train("gpt", change, **KEPT, mlp_chunks="3")
            assert_trained_alike(found, expected)
            assert found[2] == [pieces * 3] * 2, name


def test_an_output_that_something_reads_is_computed(pool):
    pool.run(read_outputs)


def shared_experts(rank):
    pieces = [3, 2, 2]
    with parallel():
        expected = train("experts")
        found = train("experts", mlp_chunks="3")
        assert_trained_alike(found, expected)
        assert found[2] == [pieces * 2] * 2
        # Their gate, or the sum with the routed experts, comes between them and the residual.
        found = train("experts", **KEPT, mlp_chunks="3")
        assert_trained_alike(found, expected)
        assert found[2] == [pieces * 3] * 2


def test_shared_experts_run_in_pieces(pool):
    pool.run(shared_experts)


def test_losses_of_a_run_are_those_without_pieces():
    """Real training on two tensor ranks by two data ranks' worth of overlap and sharded states."""
    common = (
        *("--tensor-model-parallel-size", "1", "--use-distributed-optimizer"),
        *("--overlap-grad-reduce", "--overlap-param-gather", "--eval-iters", "1"),
    )
    whole = trained(launch(2, *common))
    cut = trained(launch(2, *common, "--seqpar-mlp-chunks", "5"))
    assert cut.losses == pytest.approx(whole.losses, rel=1e-5)
