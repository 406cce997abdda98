# SPDX-License-Identifier: Apache-2.0
"""Megatron's own MLP in pieces: its numbers, its gradient hooks, its messages, its forwards.

Two ranks run under the CPU runtime; see `mlp_runs.py`.
"""

from __future__ import annotations

import contextlib
from collections import Counter

import pytest

from megatron_seqpar.cpu_runtime.activation import ENVIRONMENT
from tests.integration.mlp_runs import (
    BATCH,
    ROWS,
    WIDTH,
    assert_equal,
    assert_trained_alike,
    build,
    counting_messages,
    fusion,
    inputs,
    kinds,
    parallel,
    prepare,
    run,
    settings,
    train,
    transformer_config,
)
from tests.integration.runs import HERE, launch, trained
from tests.support.pool import GlooPool
from tests.support.releases import at_least


@pytest.fixture(scope="module")
def pool():
    with pytest.MonkeyPatch.context() as environment:
        for name, value in ENVIRONMENT.items():
            environment.setenv(name, value)
        workers = GlooPool(2)
    workers.run(prepare, timeout=240.0)
    yield workers
    workers.stop()


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
        # torch 2.13 sums a whole product's gradient more exactly than 2.11 did
        ratio = 2.2 if torch.torch_version.TorchVersion(torch.__version__) >= "2.13" else 2
        for count in (2, 16, rows):
            with settings(mlp_chunks=str(count)):
                for got, limit in zip(errors(), own, strict=True):
                    assert got <= ratio * limit, (count, got, limit)


def test_bf16_errors_are_those_of_the_whole(pool):
    pool.run(bf16)


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
    for count in (3,) if tensor > 1 else (1, ROWS):
        found, ours, fused_products = steps(fused, distributed, count, tensor, tensor > 1)
        assert ours == hooks, "hooks report as often as without pieces"
        assert fused_products == count * products
        for got, right in zip(found, expected, strict=True):
            torch.testing.assert_close(got, right, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("fused", "distributed", "tensor"),
    [(False, False, 1), (True, False, 1), (True, True, 1), (False, True, 2), (True, True, 2)],
)
def test_gradient_hooks_fire_once_a_parameter_and_micro_batch(pool, fused, distributed, tensor):
    pool.run(data_parallel, fused, distributed, tensor)


def one_stand_in(rank):
    """A fused weight's stand-in is passed on, not summed: memory that nobody has written to."""
    import torch

    stock = torch.empty

    def marked(*size, **options):
        return stock(*size, **options).fill_(5.0)

    with parallel() as group, fusion(), settings(mlp_chunks="3"):
        config = transformer_config(
            params_dtype=torch.float32, gradient_accumulation_fusion=True, **kinds()["swiglu"]
        )
        mlp = build(config, group)
        for parameter in mlp.parameters():
            parameter.main_grad = torch.zeros_like(parameter)
            parameter.grad_added_to_main_grad = False
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "empty", marked)
            _, _, *passed_on = run(mlp)
        for (name, _), gradient in zip(mlp.named_parameters(), passed_on, strict=True):
            assert bool((gradient == 5.0).all()) == name.endswith("weight"), (name, gradient)


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
    pool.run(one_stand_in)
    pool.run(zeroed_stand_in)


def live(rank):
    import torch

    from tests.support.live_bytes import LiveBytes

    def peak(mlp, rows):
        """Most bytes alive beyond those left in the end: output, bias and gradients."""
        x, gradient = inputs(torch.float64, rows)
        given = [x, gradient, *mlp.parameters()]
        with LiveBytes(given) as alive:
            out, bias = mlp(x)
            found = torch.autograd.grad(out, [x, *mlp.parameters()], gradient, allow_unused=True)
        assert bias is None
        assert all(each is not None for each in found)
        return alive.peak - alive.live

    with parallel() as group:
        mlp = build(transformer_config(ffn_hidden_size=64, **kinds()["swiglu, no bias"]), group)
        whole = peak(mlp, 512)
        with settings(mlp_chunks="16"):
            assert peak(mlp, 512) <= whole / 8
            short = peak(mlp, 512)
        with settings(mlp_chunks="64"):
            assert peak(mlp, 2048) <= 1.02 * short


def test_activations_of_one_piece_are_alive(pool):
    pool.run(live)


def untouched(rank):
    """What is not cut: routed experts, scaled tokens, and everything while off."""
    import torch

    with parallel() as group:
        mlp = build(transformer_config(), group)
        keys = list(mlp.state_dict())
        metadata = {"dp_cp_group": group}
        sharded = sorted(mlp.sharded_state_dict(metadata=metadata))
        rows = []
        mlp.linear_fc1.register_forward_pre_hook(lambda module, given: rows.append(len(given[0])))
        x, _ = inputs(torch.float64)
        with settings(mlp_chunks="3"):
            assert list(mlp.state_dict()) == keys
            assert sorted(mlp.sharded_state_dict(metadata=metadata)) == sharded
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
        if kind == "hybrid" and not at_least("0.18"):  # MambaModel recomputes nothing itself
            return
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


@pytest.mark.slow
def test_losses_of_a_run_are_those_without_pieces():
    """Real training on two data ranks, with gradients and weights on their way meanwhile."""
    common = (
        *("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"),
        *("--micro-batch-size", "1", "--global-batch-size", "4"),
    )
    script = HERE / "count_rows.py"
    whole = trained(launch(2, *common, script=script))
    cut = trained(launch(2, *common, "--seqpar-mlp-chunks", "5", script=script))
    assert cut.losses == pytest.approx(whole.losses, rel=1e-5)
    # 3 steps of 2 micro-batches of 96 tokens through 2 layers.
    assert "rows of fc1: {96: 12}" in whole.text
    assert "rows of fc1: {19: 96, 20: 24}" in cut.text
