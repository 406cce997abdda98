# SPDX-License-Identifier: Apache-2.0
"""Pieces are taken only where a step would not fit, and then as few as that needs."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_seqpar.memory.choose import ROOM_LEFT, choose
from megatron_seqpar.memory.sizes import FULL, Activations

LLAMA3_8B = Activations(
    tokens=131072,
    layers=32,
    element=2,
    hidden=4096,
    query=4096,
    key_value=2048,
    heads=32,
    mlp_up=28672,
    mlp_down=14336,
    vocabulary=128256,
)
MODES = (FULL, "none", "mlp", "attention-qkv", "attention-output")
STATE = 16 * 2**30


def chosen(sizes: Activations, recompute: str, budget: float, **given):
    return choose(
        sizes,
        recompute,
        fixed_bytes=STATE,
        budget_bytes=int(budget),
        least_tokens=1024,
        **given,
    )


def room(budget: float) -> float:
    return budget * (1 - ROOM_LEFT) - STATE


def test_nothing_is_cut_where_all_fits() -> None:
    short = dataclasses.replace(LLAMA3_8B, tokens=4096)
    for recompute in MODES:
        choice = chosen(short, recompute, 80 * 2**30)
        assert (choice.mlp, choice.loss, choice.fits) == (0, 0, True)


@given(
    tokens=st.integers(1024, 2**20),
    recompute=st.sampled_from(MODES),
    budget=st.floats(18 * 2**30, 2000 * 2**30),
)
def test_what_is_chosen_fits_and_half_as_many_pieces_would_not(tokens, recompute, budget) -> None:
    sizes = dataclasses.replace(LLAMA3_8B, tokens=tokens)
    choice = chosen(sizes, recompute, budget)
    most = tokens // 1024
    assert max(choice.mlp, choice.loss) <= most
    assert choice.fits == (sizes.peak(recompute, choice.mlp, choice.loss) <= room(budget))
    if not choice.fits:
        assert (choice.mlp, choice.loss) == (most, most)
    elif choice.mlp or choice.loss:
        assert sizes.peak(recompute) > room(budget), "cut for nothing"
        half = (choice.mlp // 2, choice.loss // 2)
        if max(choice.mlp, choice.loss) > 3:
            assert sizes.peak(recompute, *half) > room(budget), "more pieces than it takes"


def test_the_loss_is_cut_first_where_a_cut_mlp_would_run_twice() -> None:
    """Logits of 128K x 128K tokens come to 94 GiB; kept MLPs of a few layers would fit."""
    sizes = dataclasses.replace(LLAMA3_8B, layers=1)
    choice = chosen(sizes, "none", 64 * 2**30)
    assert choice.mlp == 0
    assert choice.loss > 1
    assert choice.fits


def test_numbers_that_are_given_stay() -> None:
    choice = chosen(LLAMA3_8B, "attention-output", 190 * 2**30, mlp=5)
    assert choice.mlp == 5
    assert choice.loss > 0
    choice = chosen(LLAMA3_8B, "attention-output", 20 * 2**30, mlp=5, loss=7)
    assert (choice.mlp, choice.loss, choice.fits) == (5, 7, False)


def test_reasons_are_given_in_gib() -> None:
    choice = chosen(LLAMA3_8B, "attention-output", 190 * 2**30)
    kept = 32 * LLAMA3_8B.kept_per_layer("attention-output")
    assert f"model state 16 GiB + kept activations {kept / 2**30:.3g} GiB" in choice.why
    assert "of 190 GiB" in choice.why
    assert "in one piece" in choice.why


def test_each_mode_keeps_less_than_the_one_before() -> None:
    kept = [LLAMA3_8B.kept_per_layer(mode) for mode in ("none", *MODES[2:], FULL)]
    assert kept == sorted(kept, reverse=True)
    assert len(set(kept)) == len(kept)


def test_kept_bytes_of_a_layer_by_hand() -> None:
    """Llama 3 8B in bf16: a layer's input is 8 KiB a token, attention's output as much."""
    per_token = LLAMA3_8B.kept_per_layer("attention-output") / LLAMA3_8B.tokens
    assert per_token == 2 * 4096 + 2 * 4096 + 4 * 32
    assert LLAMA3_8B.kept_per_layer(FULL) / LLAMA3_8B.tokens == 2 * 4096
    split = dataclasses.replace(LLAMA3_8B, shared=4)
    assert split.kept_per_layer(FULL) / split.tokens == 2 * 1024


def test_logits_by_hand() -> None:
    """bf16: logits or their gradient of 2 bytes beside an fp32 softmax; fp32: in place.

    With them the last norm's input, output and its gradient, and the head's own gradient.
    """
    logits, hidden, head = 131072 * 128256, 131072 * 4096, 4096 * 128256
    assert LLAMA3_8B.loss_moment() == 6 * logits + 3 * 2 * hidden + 2 * head
    fp32 = dataclasses.replace(LLAMA3_8B, element=4)
    assert fp32.loss_moment() == 4 * logits + 3 * 4 * hidden + 4 * head
    states = 2 * hidden * (3 + 1 / 16)
    assert LLAMA3_8B.loss_moment(16) == 6 * logits / 16 + states + (2 + 4) * head
    fused = dataclasses.replace(LLAMA3_8B, sums=False, predictions=3)
    assert fused.loss_moment(16) == 6 * logits / 16 + states
    assert fused.loss_moment() == 6 * logits * 3 + 3 * 2 * hidden
    middle = dataclasses.replace(LLAMA3_8B, vocabulary=0)
    assert middle.loss_moment() == 0


def test_a_gate_in_several_operations_keeps_half_of_its_input_twice() -> None:
    split = dataclasses.replace(LLAMA3_8B, split_gate=True)
    more = split.kept_per_layer("none") - LLAMA3_8B.kept_per_layer("none")
    assert more == 2 * 14336 * 131072
    assert split.kept_per_layer("mlp") == LLAMA3_8B.kept_per_layer("mlp")
    plain = dataclasses.replace(split, mlp_up=14336)
    assert plain.kept_per_layer("none") == split.kept_per_layer("none") - 2 * 28672 * 131072


@pytest.mark.parametrize("recompute", MODES)
def test_pieces_never_take_more(recompute: str) -> None:
    peaks = [LLAMA3_8B.peak(recompute, pieces, pieces) for pieces in (0, 2, 4, 64)]
    assert peaks == sorted(peaks, reverse=True)
