# SPDX-License-Identifier: Apache-2.0
"""Where a repeated layer's input and attention wait, and what is said where there is nowhere."""

from __future__ import annotations

import pytest
import torch

from megatron_seqpar.config import SeqParConfig
from megatron_seqpar.integration import offload, recompute, state
from megatron_seqpar.memory.offload import Stash
from tests.integration.test_recompute import reentrant
from tests.integration.test_recompute_models import Eager

STASH = SeqParConfig(recompute="attention-output", offload="stash")


@pytest.fixture(autouse=True)
def fresh():
    offload.reset()
    yield
    offload.reset()
    state.set_config(SeqParConfig())


def test_a_cpu_run_moves_nothing_and_says_so_once(capsys):
    state.set_config(STASH)
    for _ in range(3):
        assert offload.parcel_for(torch.zeros(2)) is None
    said = capsys.readouterr().out
    assert said.count("--seqpar-offload stash moves nothing") == 1
    assert offload.counts() == {"bytes_out": 0, "bytes_in": 0, "host_bytes": 0}


def test_nothing_is_said_unasked(capsys):
    assert offload.parcel_for(torch.zeros(2)) is None
    assert capsys.readouterr().out == ""


def test_each_forward_step_is_a_micro_batch(monkeypatch):
    stash = Stash(torch.device("cpu"), Eager())
    monkeypatch.setattr(offload, "_stash", stash)
    step = offload.around_forward_step(lambda layers: [stash.parcel().group for _ in range(layers)])
    first, second = step(2), step(1)
    assert first[0] == first[1] != second[0]


def test_only_the_input_of_a_layer_is_moved_besides_its_attention():
    """Megatron adds residuals with gradient on in a run without; that is no part of backward."""
    stash = Stash(torch.device("cpu"), Eager())
    weight = torch.ones(4, requires_grad=True)

    def layer(hidden):
        with torch.enable_grad():
            return hidden * hidden * weight  # saves its factors

    hidden = torch.full((4,), 3.0, requires_grad=True)
    out = recompute.checkpointed(layer, hidden, reentrant, stash.parcel())
    assert stash.bytes_out == hidden.numel() * 4
    out.sum().backward()
    assert torch.equal(hidden.grad, torch.full((4,), 6.0))
    assert torch.equal(weight.grad, torch.full((4,), 9.0))
    assert stash.pool.in_use == 0


@pytest.mark.needs_gpu
def test_layers_on_a_gpu_give_the_same_bits_with_less_memory():
    device = torch.device("cuda", torch.cuda.current_device())
    weights = [torch.randn(256, 256, device=device, requires_grad=True) for _ in range(8)]
    kept = {}
    for name in ("none", "stash"):
        state.set_config(SeqParConfig(recompute="attention-output", offload=name))
        hidden = torch.linspace(-1, 1, 1 << 22, device=device).view(-1, 256).requires_grad_()
        start, before = hidden, torch.cuda.memory_allocated()
        for weight in weights:
            parcel = offload.parcel_for(hidden)
            hidden = recompute.checkpointed(
                lambda x, weight=weight: torch.tanh(x @ weight), hidden, reentrant, parcel
            )
            del parcel
        held = torch.cuda.memory_allocated() - before
        hidden.square().sum().backward()
        kept[name] = held, [start.grad, *(weight.grad for weight in weights)]
        for weight in weights:
            weight.grad = None
    assert kept["stash"][0] <= 3 * 4 * (1 << 22) < kept["none"][0]
    for expected, got in zip(kept["none"][1], kept["stash"][1], strict=True):
        assert torch.equal(expected, got)
