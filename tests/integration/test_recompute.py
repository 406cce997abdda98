# SPDX-License-Identifier: Apache-2.0
"""A checkpointed layer gets its attention back instead of running it again."""

from __future__ import annotations

import pytest
import torch
from torch.utils import checkpoint as torch_checkpoint

from megatron_seqpar.attention import Causal, dist_flash_attention
from megatron_seqpar.attention.transport import ThreadTransport
from megatron_seqpar.config import SeqParConfig
from megatron_seqpar.errors import UnsupportedError
from megatron_seqpar.integration import recompute, state

HEADS, DIM = 2, 8


class Layer(torch.nn.Module):
    """Projections around attention, and an MLP: `[s, b, h] -> [s, b, h]`."""

    def __init__(self, transport) -> None:
        super().__init__()
        width = HEADS * DIM
        self.qkv = torch.nn.Linear(width, 3 * width)
        self.mlp = torch.nn.Linear(width, width)
        # Ranks are threads: the default initialisation would share one random state.
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
        self.transport = transport
        self.runs = 0

    def forward(self, hidden):
        self.runs += 1
        q, k, v = self.qkv(hidden).unflatten(-1, (3, HEADS, DIM)).unbind(2)

        def compute(known=None):
            return dist_flash_attention(
                q,
                k,
                v,
                group=self.transport,
                mask=Causal(),
                tensor_layout="sbhd",
                return_lse=True,
                known=known,
            )

        keepsake = recompute.current()
        out = compute()[0] if keepsake is None else keepsake.attend(compute)
        return hidden + self.mlp(torch.nn.functional.gelu(out.flatten(2)))


def reentrant(function, distribute, hidden):
    """Megatron's checkpoint signature over torch's implementation."""
    return torch_checkpoint.checkpoint(function, hidden, use_reentrant=True)


def train(transport, kept: bool):
    """Two micro-batches in flight through two layers; gradients, outputs, runs and counters."""
    layers = [Layer(transport), Layer(transport)]
    generator = torch.Generator().manual_seed(transport.rank)
    batches = [torch.randn(6, 1, HEADS * DIM, generator=generator) for _ in range(2)]
    outputs = []
    for hidden in batches:
        hidden.requires_grad_()
        for layer in layers:
            if kept:
                hidden = recompute.checkpointed(layer, hidden, reentrant)
            else:
                hidden = layer(hidden)
        outputs.append(hidden)
    for scale, output in zip((1.0, 3.0), outputs, strict=True):
        (scale * output.square()).sum().backward()
    gradients = [p.grad for layer in layers for p in layer.parameters()]
    gradients += [hidden.grad for hidden in batches]
    counters = transport.counters
    return gradients, outputs, [layer.runs for layer in layers], counters


@pytest.mark.parametrize("size", [1, 2, 3])
def test_gradients_are_bitwise_equal_and_attention_runs_once(size):
    plain = ThreadTransport.run(size, lambda transport: train(transport, kept=False))
    kept = ThreadTransport.run(size, lambda transport: train(transport, kept=True))
    for rank in range(size):
        for index in (0, 1):
            for expected, got in zip(plain[rank][index], kept[rank][index], strict=True):
                assert torch.equal(expected, got)
        assert plain[rank][2] == [2, 2]
        assert kept[rank][2] == [4, 4]
        assert plain[rank][3].forward_calls == kept[rank][3].forward_calls > 0
        assert plain[rank][3].messages == kept[rank][3].messages
        assert plain[rank][3].bytes == kept[rank][3].bytes


def test_nothing_is_kept_outside_of_a_layer():
    assert recompute.current() is None
    assert not recompute.replaying()


class Watched(torch.autograd.Function):
    """The identity; notes in `seen` whether a layer is being repeated, forward and backward."""

    @staticmethod
    def forward(ctx, tensor, seen):
        ctx.seen = seen
        seen.append(("forward", recompute.replaying()))
        return tensor.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.seen.append(("backward", recompute.replaying()))
        return gradient, None


def test_a_layer_knows_that_it_is_repeated():
    seen: list[tuple[str, bool]] = []
    hidden = torch.ones(1, requires_grad=True)
    out = recompute.checkpointed(lambda x: Watched.apply(x, seen), hidden, reentrant)
    assert not recompute.replaying()
    out.sum().backward()
    assert seen == [("forward", False), ("forward", True), ("backward", False)]


def test_a_failing_layer_leaves_no_store_behind():
    def fails(hidden):
        raise ArithmeticError("in the layer")

    with pytest.raises(ArithmeticError):
        recompute.checkpointed(fails, torch.ones(1, requires_grad=True), reentrant)
    assert recompute.current() is None


def test_what_is_kept_goes_as_backward_goes_and_serves_once():
    transport = ThreadTransport.run(1, lambda transport: transport)[0]
    hidden = torch.ones(6, 1, HEADS * DIM, requires_grad=True)
    stores: list[recompute.Keepsake] = []
    layer = Layer(transport)

    def watched(hidden):
        store = recompute.current()
        assert store is not None
        stores.append(store)
        return layer(hidden)

    out = recompute.checkpointed(watched, hidden, reentrant)
    out.sum().backward(retain_graph=True)
    assert stores[0] is stores[1]
    assert stores[0]._kept == [None]
    with pytest.raises(UnsupportedError, match=r"a second time.*--recompute-granularity full"):
        out.sum().backward()


class Block:
    """What the patch looks at in a layer."""

    training = True

    def forward(self, hidden, *more, **named):
        return hidden * 2


@pytest.mark.parametrize(
    ("more", "named", "text"),
    [
        ((), {"context": torch.ones(1, requires_grad=True)}, "gets context,"),
        ((None, torch.ones(1, requires_grad=True)), {}, "gets argument 2,"),
        ((), {"rotary_pos_emb": (torch.ones(1, requires_grad=True), None)}, "rotary_pos_emb,"),
    ],
)
def test_other_inputs_that_need_a_gradient_are_refused(more, named, text):
    state.set_config(SeqParConfig(recompute="attention-output"))
    try:
        forward = recompute.wrap_layer_forward(Block.forward)
        with pytest.raises(UnsupportedError, match=text):
            forward(Block(), torch.ones(1, requires_grad=True), *more, **named)
    finally:
        state.set_config(SeqParConfig())
