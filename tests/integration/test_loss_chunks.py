# SPDX-License-Identifier: Apache-2.0
"""Megatron's models with their loss in pieces: its numbers, its gradient hooks, its messages.

Truth is the same model with the setting off. Its loss narrows fp64 logits to fp32, so where it is
compared in fp64 that one step of it is widened. The work runs on two ranks under the CPU runtime.
"""

from __future__ import annotations

import contextlib
import types
from collections import Counter

import pytest

from megatron_seqpar.config import SeqParConfig
from megatron_seqpar.cpu_runtime.activation import ENVIRONMENT
from tests.integration.runs import launch, trained
from tests.support.pool import GlooPool
from tests.support.releases import at_least, hybrid_model, since

LENGTH, BATCH, VOCABULARY, WIDTH = 8, 2, 24, 16
OFF = SeqParConfig()


@pytest.fixture(scope="module")
def pool():
    pytest.importorskip("megatron.core")
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

    cpu_runtime.activate()
    from megatron_seqpar.integration import install

    install(OFF)


@contextlib.contextmanager
def parallel(tensor=1):
    """Megatron's groups over the two ranks."""
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor, create_gloo_process_groups=False
    )
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()


@contextlib.contextmanager
def pieces(count):
    """The loss in so many pieces for a while; 0 for off."""
    from megatron_seqpar.integration import state

    state.set_config(SeqParConfig(loss_chunks=str(count)) if count else OFF)
    try:
        yield
    finally:
        state.set_config(OFF)


@contextlib.contextmanager
def wide_stock_loss():
    """Megatron's loss without its narrowing of fp64 logits."""
    from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy

    before = VocabParallelCrossEntropy.calculate_logits_max
    VocabParallelCrossEntropy.calculate_logits_max = staticmethod(
        lambda logits: (logits.clone(), logits.max(-1)[0])
    )
    try:
        yield
    finally:
        VocabParallelCrossEntropy.calculate_logits_max = staticmethod(before)


def seed():
    import torch
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    model_parallel_cuda_manual_seed(5)
    torch.manual_seed(5)


def build(*, tied=False, mtp=None, hybrid=False, dtype=None, **options):
    """A model of one layer in the dtype, fp64 by default."""
    import torch
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    seed()
    dtype = dtype or torch.float64
    values = {
        "num_layers": 1,
        "hidden_size": WIDTH,
        "num_attention_heads": 2,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "use_cpu_initialization": True,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "add_bias_linear": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "init_method_std": 0.5,
        "mtp_num_layers": mtp,
        "bf16": dtype == torch.bfloat16,
    }
    config = TransformerConfig(**{**values, **options})
    more = {
        "max_sequence_length": LENGTH,
        "share_embeddings_and_output_weights": tied,
        "position_embedding_type": "rope",
    }
    if hybrid:
        from tests.integration.local_hybrid_spec import hybrid_stack_spec

        model = hybrid_model(config, hybrid_stack_spec, "*-", vocab_size=VOCABULARY, **more)
    else:
        spec = gpt_layer_specs.get_gpt_layer_local_spec()
        if mtp:
            more["mtp_block_spec"] = gpt_layer_specs.get_gpt_mtp_block_spec(config, spec, False)
        model = GPTModel(config, spec, vocab_size=VOCABULARY, **more)
    return model.to(dtype)


def batch(seed=0):
    """Tokens, labels and loss mask `[b, s]`, labels in all of the vocabulary, one of them ignored;
    positions, and the causal mask."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    labels = torch.randperm(BATCH * LENGTH, generator=generator) * 3 // 2 % VOCABULARY
    labels[3] = -100
    mask = torch.rand(BATCH, LENGTH, generator=generator) < 0.8
    mask.view(-1)[3] = False
    return {
        "input_ids": torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=generator),
        "position_ids": torch.arange(LENGTH).repeat(BATCH, 1),
        "attention_mask": torch.ones(1, 1, LENGTH, LENGTH).tril() < 0.5,
        "labels": labels.view(BATCH, LENGTH),
        "loss_mask": mask.to(torch.float64),
    }


def run(model, **options):
    """Losses `[b, s]`, ignored and masked ones too, and all gradients."""
    given = {**batch(), **options}
    model.zero_grad()
    # MambaModel of 0.16 predicts no further tokens, and takes no loss mask for them
    without = () if at_least("0.17") or hasattr(model, "mtp_process") else ("loss_mask",)
    loss = model(**{name: value for name, value in given.items() if name not in without})
    (loss * given["loss_mask"].to(loss.dtype)).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def assert_equal(found, expected, what, bound=1e-10):
    assert found.keys() == expected.keys(), what
    for name, right in expected.items():
        assert found[name].dtype == right.dtype, (what, name)
        apart = (found[name] - right).norm() / right.norm().clamp(min=1e-30)
        assert apart <= bound, (what, name, float(apart))


VARIANTS = {
    "untied": {},
    "tied": {"tied": True},
    "hybrid": {"hybrid": True},
    "hybrid, tied": {"hybrid": True, "tied": True},
    "mup": {"use_mup": True, "mup_base_hidden_size": 4},
    "fused": {"cross_entropy_loss_fusion": True},
}
NEWER = {
    "mup": since("0.17", "MuP"),
    "detached": since("0.19", "detached heads"),
    "detached, tied": since("0.19", "detached heads"),
}


def every_count(rank, name):
    with parallel():
        model = build(**VARIANTS[name])
        with wide_stock_loss():
            # The fused loss hands out bf16 gradients whatever the dtype: truth is the other one.
            model.config.cross_entropy_loss_fusion = False
            expected = run(model)
            model.config.cross_entropy_loss_fusion = name == "fused"
        assert expected["loss"].dtype == expected["embedding.word_embeddings.weight"].dtype
        for count in range(1, LENGTH + 2):
            with pieces(count):
                assert_equal(run(model), expected, (name, count))
        assert "forward" not in vars(model.output_layer), "the model is as it was"


@pytest.mark.parametrize("name", [pytest.param(n, marks=NEWER.get(n, ())) for n in VARIANTS])
def test_every_number_of_pieces_gives_megatrons_numbers(pool, name):
    pool.run(every_count, name)


def tensor_parallel(rank, split, tied):
    with parallel(2):
        model = build(tied=tied, tensor_model_parallel_size=2, sequence_parallel=split)
        with wide_stock_loss():
            expected = run(model)
        for count in range(1, LENGTH + 2):
            with pieces(count):
                assert_equal(run(model), expected, (split, tied, count))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("split", [False, True])
def test_tensor_parallelism_with_and_without_split_activations(pool, split, tied):
    pool.run(tensor_parallel, split, tied)


def counting_messages():
    """A mode that counts collectives."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Messages(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.count = Counter()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "c10d":
                self.count[function._schema.name] += 1
            return function(*args, **(kwargs or {}))

    return Messages()


def messages(rank, split):
    import torch

    with parallel(2):
        model = build(tensor_model_parallel_size=2, sequence_parallel=split)
        layer = model.output_layer
        products = Counter()
        stock = layer._forward_impl

        def counted(*args, **kwargs):
            products["forward"] += 1
            return stock(*args, **kwargs)

        layer._forward_impl = counted
        rows = LENGTH // 2 if split else LENGTH
        hidden = torch.randn(rows, BATCH, WIDTH, dtype=torch.float64, requires_grad=True)
        model.decoder.forward = lambda hidden_states, **options: hidden

        def passes():
            products.clear()
            given = batch()
            with counting_messages() as embedded:
                model.embedding(given["input_ids"], given["position_ids"])
            with counting_messages() as forward:
                loss = model(**given)
            with counting_messages() as backward:
                loss.sum().backward()
            forward.count.subtract(embedded.count)
            return +forward.count, +backward.count, products["forward"]

        forward, backward, once = passes()
        assert once == 1
        assert forward["c10d::allreduce_"] == 3, "largest logit, label's logit, sum"
        assert forward.total() == 3 + split
        for count in (1, 3, LENGTH + 1):
            made = min(count, rows)
            with pieces(count):
                ours, ours_backward, products_made = passes()
            assert products_made == 2 * made
            # two messages for the loss of a piece, and Megatron's gather
            assert ours["c10d::allreduce_"] == 2 * made
            assert ours.total() == (2 + split) * made
            # in backward what the head sends, with its gather in forward again; no more
            assert ours_backward.total() == made * (backward.total() + split)


@pytest.mark.parametrize("split", [False, True])
def test_products_with_the_head_and_messages(pool, split):
    """Twice the products, and a piece sends two messages for its loss where stock sends three."""
    pool.run(messages, split)


def multi_token(rank, options, tensor):
    import torch
    from megatron.core import parallel_state
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    def logged():
        """What is logged: the heads' losses, right predictions, tokens."""
        values = dict(MTPLossLoggingHelper.tracker)
        MTPLossLoggingHelper.tracker.clear()
        return {k: v.clone() for k, v in values.items() if isinstance(v, torch.Tensor)}

    split = {"tensor_model_parallel_size": tensor, "sequence_parallel": tensor > 1}
    with parallel(tensor):
        model = build(mtp=2, **split, **options)
        labels = batch()["labels"].clamp(min=0)  # MTP rolls them, and counts tokens
        # Some predictions must be right for their count to say anything: those of the first head in
        # the first sample, which sees labels one place to the left.
        seen = []
        watch = model.output_layer.register_forward_hook(
            lambda layer, args, output: seen.append(output[0].detach())
        )
        run(model)
        watch.remove()
        parts = [torch.empty_like(seen[0]) for _ in range(tensor)]
        group = parallel_state.get_tensor_model_parallel_group()
        torch.distributed.all_gather(parts, seen[0].contiguous(), group=group)
        labels[0, 1:] = torch.cat(parts, -1).argmax(-1)[:-1, 0]
        MTPLossLoggingHelper.tracker.clear()
        with wide_stock_loss():
            expected, log = run(model, labels=labels), logged()
        if at_least("0.19"):  # counts predictions
            assert log.keys() == {"loss_values", "correct_values", "total_values"}
            counted = batch()["loss_mask"][0, 1:].sum()
            assert counted <= log["correct_values"][0] < log["total_values"][0]
        else:
            assert log.keys() == {"values"}
        for count in range(1, LENGTH + 2):
            with pieces(count):
                assert_equal(run(model, labels=labels), expected, (options, count))
                found = logged()
            assert found.keys() == log.keys()
            for key, value in log.items():
                torch.testing.assert_close({key: found[key]}, {key: value})
        # In evaluation nobody asks for predictions, and the losses are the same.
        model.eval()
        with torch.no_grad(), wide_stock_loss():
            truth = model(**{**batch(), "labels": labels})
            with pieces(3):
                torch.testing.assert_close(model(**{**batch(), "labels": labels}), truth)


MTP = {
    "plain": ({}, 1),
    "tied": ({"tied": True}, 1),
    "per token": ({"calculate_per_token_loss": True}, 1),
    "detached": ({"mtp_detach_heads": True}, 1),
    "detached, tied": ({"mtp_detach_heads": True, "tied": True}, 1),
    "tensor parallel": ({}, 2),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=NEWER.get(n, ())) for n in MTP])
def test_multi_token_prediction(pool, name):
    pool.run(multi_token, *MTP[name])


def bf16(rank):
    import torch

    with parallel():
        rounded = build(dtype=torch.bfloat16)
        exact = build()
        with torch.no_grad():
            for wide, narrow in zip(exact.parameters(), rounded.parameters(), strict=True):
                wide.copy_(narrow)
        hidden = torch.randn(LENGTH * 8, BATCH, WIDTH).to(torch.bfloat16)
        labels = torch.arange(BATCH * LENGTH * 8).view(BATCH, -1) % VOCABULARY

        def results(model):
            """Loss and gradients of head and hidden states, the latter given."""
            given = hidden.to(model.output_layer.weight.dtype, copy=True).requires_grad_()
            model.zero_grad()
            model.decoder.forward = lambda hidden_states, **options: given
            loss = model(**{**batch(), "labels": labels})
            loss.sum().backward()
            return [loss.detach(), given.grad, model.output_layer.weight.grad]

        with wide_stock_loss():
            truth = results(exact)

        def errors():
            pairs = zip(results(rounded), truth, strict=True)
            return [((got.double() - right).norm() / right.norm()).item() for got, right in pairs]

        own = errors()
        for count in (1, 4, LENGTH * 8):
            with pieces(count):
                for got, limit in zip(errors(), own, strict=True):
                    assert 0 < got <= 2 * limit, (count, got, limit)


def test_bf16_errors_are_those_of_the_whole(pool):
    pool.run(bf16)


def frozen(rank):
    """A head that does not learn, and hidden states that do not."""
    with parallel():
        model = build()
        for learns in ("embedding", "output_layer"):
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name.startswith(learns))
            with wide_stock_loss():
                expected = run(model)
            assert len(expected) == 2
            with pieces(3):
                assert_equal(run(model), expected, learns)


def test_what_does_not_learn(pool):
    pool.run(frozen)


@contextlib.contextmanager
def fusion():
    """Megatron's gradient-accumulation fusion with its CUDA extension written in torch."""
    from megatron.core.tensor_parallel import layers

    calls = Counter()

    def accumulate(total_input, grad_output, main_grad):
        calls["products"] += 1
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


def steps(count, fused, distributed, **options):
    """Two steps of two micro-batches under Megatron's DDP over the two ranks.

    Returns the reduced gradients after each, and how often each parameter's hook reported.
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

    def register_grad_ready(self, parameter, *args):
        reports[names[parameter]] += 1
        return stock(self, parameter, *args)

    with fusion() as calls:
        model = build(dtype=torch.float32, gradient_accumulation_fusion=fused, **options)
        names = {parameter: name for name, parameter in model.named_parameters()}
        wrapped = DistributedDataParallel(
            model.config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                overlap_grad_reduce=True,
                use_distributed_optimizer=distributed,
                bucket_size=64,
            ),
            model,
        )
        group_class.register_grad_ready = register_grad_ready
        try:
            with pieces(count):
                for step in range(2):
                    wrapped.zero_grad_buffer()
                    for micro in range(2):
                        given = batch(seed=10 * step + micro + torch.distributed.get_rank())
                        given["labels"] = given["labels"].clamp(min=0)
                        mask = given["loss_mask"].float()
                        given["loss_mask"] = mask
                        with contextlib.nullcontext() if micro else wrapped.no_sync():
                            (wrapped(**given) * mask).sum().backward()
                        assert all(parameter.grad is None for parameter in names)
                    hooks.append(dict(reports))
                    reports.clear()
                    wrapped.finish_grad_sync()
                    found.append({n: p.main_grad.clone() for p, n in names.items()})
        finally:
            group_class.register_grad_ready = stock
    return found, hooks, calls["products"]


def data_parallel(rank, fused, distributed, options):
    import torch

    with parallel():
        expected, hooks, products = steps(0, fused, distributed, **options)
        heads = 1 + (options.get("mtp") or 0)
        for count in (1, 3, LENGTH):
            found, ours, ours_products = steps(count, fused, distributed, **options)
            assert ours == hooks, "hooks report as often as without pieces"
            # four micro-batches; only the head's products are multiplied
            assert ours_products == products + (4 * heads * (count - 1) if fused else 0)
            for got, right in zip(found, expected, strict=True):
                for name, gradient in right.items():
                    torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    "options", [{}, {"tied": True}, {"tied": True, "mtp": 1}], ids=["untied", "tied", "mtp"]
)
@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_gradient_hooks_fire_once_a_parameter_and_micro_batch(pool, fused, distributed, options):
    pool.run(data_parallel, fused, distributed, options)


def memory(rank):
    import torch

    from tests.support.live_bytes import LiveBytes

    with parallel():
        model, rows = build(dtype=torch.float32), 256
        hidden = torch.randn(rows, 1, WIDTH, requires_grad=True)
        model.decoder.forward = lambda hidden_states, **options: hidden
        given = {**batch(), "labels": torch.zeros(1, rows, dtype=torch.int64)}

        def largest(count):
            with pieces(count), LiveBytes([hidden]) as live:
                model(**given).sum().backward()
            return live.largest

        assert largest(0) == rows * VOCABULARY * 4
        assert largest(16) == rows * WIDTH * 4, "the gradient of the hidden states"


def test_logits_of_the_whole_sequence_never_exist(pool):
    pool.run(memory)


def refused(rank):
    import torch

    from megatron_seqpar.errors import UnsupportedError

    with parallel(2):
        model = build(tensor_model_parallel_size=2)
        given = batch()
        without = {**given, "labels": None}
        logits = model(**without)
        with pieces(2):
            assert torch.equal(model(**without), logits), "without labels, logits as ever"
            loss = type(model).compute_language_model_loss
            with pytest.raises(UnsupportedError, match="GPTModel computes a loss from logits"):
                loss(model, given["labels"], logits.transpose(0, 1))
            with pytest.raises(UnsupportedError, match="gathered over tensor-parallel ranks"):
                model(**given, runtime_gather_output=True)
            for name, use in {
                "its .float": lambda labels, logits: logits.float(),
                "its .shape": lambda labels, logits: logits.shape,
                "argmax": lambda labels, logits: torch.argmax(logits, -1),
                "some of its elements": lambda labels, logits: logits[0],
                "its length": lambda labels, logits: len(logits),
                "its truth value": lambda labels, logits: logits or None,
                "multiplied with a Tensor": lambda labels, logits: logits * torch.ones(1),
            }.items():
                model.compute_language_model_loss = use
                with pytest.raises(UnsupportedError, match=rf"{name}.*--seqpar-loss-chunks off"):
                    model(**given)
            del model.compute_language_model_loss
            model.config.config_logger_dir = "logs"
            with pytest.raises(UnsupportedError, match="--config-logger-dir logs with"):
                model(**given)
            model.config.config_logger_dir = ""
            assert "forward" not in vars(model.output_layer), "also after errors"
            model(**given)


def test_nothing_but_the_loss_gets_logits(pool):
    pool.run(refused)


def unchosen(rank):
    from megatron_seqpar.errors import UnsupportedError
    from megatron_seqpar.integration import state

    with parallel():
        model = build()
        try:
            state.set_config(SeqParConfig(loss_chunks="auto"))
            with pytest.raises(UnsupportedError, match="Give a number or off"):
                model(**batch())
            state.set_chosen(state.ChosenChunks(mlp=0, loss=0))
            expected = model(**batch())
            state.set_chosen(state.ChosenChunks(mlp=0, loss=3))
            assert (model(**batch()) - expected).abs().max() < 1e-5
        finally:
            state.set_config(OFF)


def test_auto_must_have_chosen(pool):
    pool.run(unchosen)


@pytest.mark.slow
def test_training_over_the_axis():
    """Through the real launcher, two ranks of the axis, more pieces than divide a rank's tokens."""
    axis = ("--sequence-parallel-size", "2", "--seqpar-kernel", "reference")
    whole = trained(launch(2, *axis, mask=0.3))
    ours = ("--seqpar-loss-chunks", "5", "--cross-entropy-loss-fusion")
    chunked = trained(launch(2, *axis, *ours, mask=0.3))
    line = "seqpar: --seqpar-loss-chunks 5 takes the place of --cross-entropy-loss-fusion"
    assert chunked.text.count(line) == 1, "said once, and so the pieces ran"
    assert chunked.losses.keys() == whole.losses.keys() == {1, 2, 3}
    for step, loss in whole.losses.items():
        assert chunked.losses[step] == pytest.approx(loss, rel=2e-6)
