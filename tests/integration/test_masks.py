# SPDX-License-Identifier: Apache-2.0
"""Each layer's mask, against Megatron's own window function and its local attention's matrix."""

from __future__ import annotations

import itertools
import types

import pytest
import torch

from megatron_seqpar.config import SeqParConfig
from megatron_seqpar.errors import UnsupportedError
from megatron_seqpar.integration import state

pytest.importorskip("megatron.core")

from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.utils import is_layer_window_attention

from megatron_seqpar.attention.masks import Causal, Full, Prefix, SlidingWindow
from megatron_seqpar.integration import masks

CAUSAL, NONE = AttnMaskType.causal, AttnMaskType.no_mask


@pytest.fixture(autouse=True)
def settings():
    yield
    state.set_config(SeqParConfig())


def source(window=None, skip=None, **more):
    return types.SimpleNamespace(window_size=window, window_attn_skip_freq=skip, **more)


def seen(mask, length):
    """The mask as a matrix, by its regions."""
    matrix = torch.zeros(length, length, dtype=torch.bool)
    for region in mask.regions(length):
        for i, j in itertools.product(range(*region.q), range(*region.kv)):
            low = region.low is None or region.low <= j - i
            matrix[i, j] |= low and (region.high is None or j - i <= region.high)
    return matrix


def stock_local(length, left, right):
    """What `get_sliding_window_causal_mask` lets through: rows are queries."""
    ones = torch.ones(length, length, dtype=torch.bool)
    return torch.tril(torch.triu(ones, diagonal=-left), diagonal=right)


@pytest.mark.parametrize("skip", [None, 2, 3, [1, 0, 1, 1, 0, 0]], ids=str)
def test_the_same_layers_as_megatron_have_a_window(skip):
    config = source((5, 0), skip)
    for layer in range(1, 7):
        windowed = masks.of_layer(config, layer, CAUSAL) == SlidingWindow(5, 0)
        assert windowed == is_layer_window_attention((5, 0), skip, layer)
        if not windowed:
            assert masks.of_layer(config, layer, CAUSAL) == Causal()


@pytest.mark.parametrize("size", [(5, 0), (0, 0), (3, 2), (31, 0)])
def test_windows_of_the_local_attention(size):
    mask = masks.of_layer(source(size, transformer_impl="local"), 1, CAUSAL)
    assert torch.equal(seen(mask, 16), stock_local(16, *size))


@pytest.mark.parametrize(
    ("size", "ahead", "kind", "mask"),
    [
        ((5, 3), False, CAUSAL, SlidingWindow(5, 0)),
        ((5, -1), False, CAUSAL, SlidingWindow(5, 0)),
        ((5, -1), True, CAUSAL, SlidingWindow(5, 0)),
        ((-1, 0), False, CAUSAL, Causal()),
        ((-1, -1), True, CAUSAL, Causal()),
        ((-1, 2), True, CAUSAL, SlidingWindow(-1, 2)),
        ((-1, -1), False, NONE, Full()),
        ((5, 3), False, NONE, SlidingWindow(5, 3)),
        ((5, -1), False, NONE, SlidingWindow(5, -1)),
    ],
)
def test_what_window_sizes_mean(size, ahead, kind, mask):
    impl = "local" if ahead else "transformer_engine"
    assert masks.of_layer(source(size, transformer_impl=impl), 1, kind) == mask


def test_the_mask_setting_takes_the_place_of_causal_only():
    state.set_config(SeqParConfig(mask="prefix:8"))
    assert masks.of_layer(source(), 1, CAUSAL) == Prefix(8)
    assert masks.of_layer(source(), 1, NONE) == Full()


@pytest.mark.parametrize("kind", [AttnMaskType.arbitrary, AttnMaskType.padding, None], ids=str)
def test_masks_that_need_a_tensor_are_refused(kind):
    with pytest.raises(UnsupportedError, match=r"attn_mask_type.*causal or no_mask"):
        masks.of_layer(source(), 1, kind)


def test_masks_of_a_model():
    args = source((5, 0), 3, num_layers=6)
    assert masks.of_model(args) == (SlidingWindow(5, 0), Causal())
    assert masks.of_model(source(num_layers=6)) == (Causal(),)
