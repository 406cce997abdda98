# SPDX-License-Identifier: Apache-2.0
"""A per-token function in pieces gives what it gives whole, and never holds more than a piece."""

from __future__ import annotations

import pytest
import torch

from megatron_seqpar.memory.chunked import GradientSum, chunked
from tests.support.live_bytes import LiveBytes

ROWS, BATCH, WIDTH, INNER = 7, 2, 6, 10


class Gated:
    """A gated MLP in plain tensors: `[n, b, h] -> [n, b, h]`."""

    def __init__(self, dtype=torch.float64, *, seed=0, inner=INNER, width=WIDTH) -> None:
        generator = torch.Generator().manual_seed(seed)

        def parameter(*shape):
            values = torch.randn(*shape, generator=generator, dtype=torch.float64)
            return (values / shape[-1] ** 0.5).to(dtype).requires_grad_()

        self.up, self.bias = parameter(2 * inner, width), parameter(2 * inner)
        self.down = parameter(width, inner)
        self.calls: list[int] = []

    @property
    def parameters(self):
        return [self.up, self.bias, self.down]

    def __call__(self, x):
        self.calls.append(x.shape[0])
        gate, linear = torch.nn.functional.linear(x, self.up, self.bias).chunk(2, dim=-1)
        return (torch.nn.functional.silu(gate) * linear) @ self.down.t()


def inputs(dtype=torch.float64, rows=ROWS):
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(2, rows, BATCH, WIDTH, generator=generator, dtype=torch.float64)
    x, gradient = values.to(dtype).unbind()
    return x.clone().requires_grad_(), gradient


def gradients(out, tensors, gradient):
    return torch.autograd.grad(out, tensors, gradient, allow_unused=True)


@pytest.mark.parametrize("count", range(1, ROWS + 2))
def test_every_number_of_pieces_gives_the_whole(count):
    function, (x, gradient) = Gated(), inputs()
    tensors = [x, *function.parameters]
    whole = function(x)
    expected = gradients(whole, tensors, gradient)
    function.calls.clear()
    out = chunked(function, x, function.parameters, count)
    pieces = function.calls[:]
    assert (len(pieces), sum(pieces)) == (min(count, ROWS), ROWS)
    torch.testing.assert_close(out, whole, rtol=0, atol=1e-12)
    for got, right in zip(gradients(out, tensors, gradient), expected, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-12)
    assert function.calls == pieces * 2


def test_strides_do_not_matter():
    function, (x, gradient) = Gated(), inputs()
    whole = function(x)
    expected = gradients(whole, [x, *function.parameters], gradient)
    strided = x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    assert not strided.is_contiguous()
    out = chunked(function, strided, function.parameters, 3)
    got = gradients(out, [strided, *function.parameters], gradient)
    for mine, right in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-12)
    # A gradient without memory of its own, as a sum gives it.
    ones = chunked(function, strided, function.parameters, 3).sum()
    (mine,) = torch.autograd.grad(ones, strided)
    torch.testing.assert_close(mine, torch.autograd.grad(function(x).sum(), x)[0])


@pytest.mark.parametrize("frozen", [(0,), (1, 2), (0, 1, 2)])
@pytest.mark.parametrize("wants_x", [True, False])
def test_only_what_wants_a_gradient_gets_one(frozen, wants_x):
    function, (x, gradient) = Gated(), inputs()
    for index in frozen:
        function.parameters[index].requires_grad_(False)
    x.requires_grad_(wants_x)
    wanting = [t for t in (x, *function.parameters) if t.requires_grad]
    out = chunked(function, x, function.parameters, 3)
    assert out.requires_grad == bool(wanting)
    if wanting:
        expected = gradients(function(x), wanting, gradient)
        for got, right in zip(gradients(out, wanting, gradient), expected, strict=True):
            torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-12)


def test_what_the_function_does_not_use_gets_no_gradient():
    function, (x, gradient) = Gated(), inputs()
    unused = torch.ones(3, requires_grad=True)
    out = chunked(function, x, [*function.parameters, unused], 2)
    assert gradients(out, [unused], gradient) == (None,)
    constant = chunked(lambda piece: torch.ones_like(piece), x, [unused], 2)
    assert torch.equal(gradients(constant, [x], gradient)[0], torch.zeros_like(x))


def test_without_gradients_it_runs_once_in_pieces():
    function, (x, _) = Gated(), inputs()
    with torch.no_grad():
        out = chunked(function, x, function.parameters, 3)
    assert not out.requires_grad
    assert function.calls == [3, 2, 2]


def test_an_empty_sequence():
    function, (x, gradient) = Gated(), inputs(rows=0)
    out = chunked(function, x, function.parameters, 4)
    found = gradients(out, [x, *function.parameters], gradient)
    assert out.shape == x.shape
    assert all(torch.count_nonzero(each) == 0 for each in found)


def test_hooks_of_parameters_fire_once_a_call():
    function, (x, gradient) = Gated(), inputs()
    fired = [0, 0, 0]
    for index, parameter in enumerate(function.parameters):
        parameter.register_post_accumulate_grad_hook(
            lambda _, index=index: fired.__setitem__(index, fired[index] + 1)
        )
    for step in (1, 2):
        chunked(function, x, function.parameters, 5).backward(gradient)
        assert fired == [step] * 3


def test_an_unread_output_costs_no_forward_and_has_all_gradients():
    function, (x, gradient) = Gated(), inputs()
    tensors = [x, *function.parameters]
    expected = gradients(function(x), tensors, gradient)
    function.calls.clear()
    out = chunked(function, x, function.parameters, 3, unread=True)
    assert function.calls == []
    assert torch.count_nonzero(out) == 0
    for got, right in zip(gradients(out, tensors, gradient), expected, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-12)
    assert function.calls == [3, 2, 2]


def test_an_unread_output_of_another_kind_is_an_error():
    x, _ = inputs()
    out = chunked(lambda piece: piece.float(), x, [], 2, unread=True)
    with pytest.raises(ValueError, match=r"torch.float32, its gradient .* torch.float64"):
        out.sum().backward()
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(ValueError, match="under autocast"),
    ):
        chunked(Gated(), x, [], 2, unread=True)


def test_functions_that_mix_rows_or_draw_are_errors():
    x, _ = inputs()
    with pytest.raises(ValueError, match="3 rows in, 1 out: not a per-row function"):
        chunked(lambda piece: piece.sum(0, keepdim=True), x, [], 3)
    with pytest.raises(ValueError, match="draws random numbers"):
        chunked(torch.nn.functional.dropout, x, [], 3)


def test_autocast_is_that_of_the_call():
    function, (x, gradient) = Gated(torch.float32), inputs(torch.float32)
    tensors = [x, *function.parameters]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        whole = function(x)
        out = chunked(function, x, function.parameters, 1)
    assert out.dtype == whole.dtype == torch.bfloat16
    assert torch.equal(out, whole)
    gradient = gradient.to(torch.bfloat16)
    expected = gradients(whole, tensors, gradient)
    # Outside of autocast, where training loops run backward.
    for got, right in zip(gradients(out, tensors, gradient), expected, strict=True):
        assert torch.equal(got, right)


def test_bf16_weight_gradients_do_not_degrade_with_the_number_of_pieces():
    rows = 512
    exact, (x, gradient) = Gated(), inputs(rows=rows)
    rounded = Gated(torch.bfloat16)
    with torch.no_grad():
        for wide, narrow in zip(exact.parameters, rounded.parameters, strict=True):
            wide.copy_(narrow)
    narrow_x = x.detach().bfloat16().requires_grad_()
    narrow_gradient = gradient.bfloat16()
    x, gradient = narrow_x.detach().double(), narrow_gradient.double()
    truth = gradients(exact(x), exact.parameters, gradient)

    def error(found):
        return [
            ((got.double() - right).norm() / right.norm()).item()
            for got, right in zip(found, truth, strict=True)
        ]

    own = error(gradients(rounded(narrow_x), rounded.parameters, narrow_gradient))
    for count in (2, 16, 512):
        out = chunked(rounded, narrow_x, rounded.parameters, count)
        for got, limit in zip(
            error(gradients(out, rounded.parameters, narrow_gradient)), own, strict=True
        ):
            assert got <= 2 * limit, (count, got, limit)


def test_sums_in_bf16_would_degrade():
    """What the sum in fp32 is for: the same pieces summed in bf16 lose the small ones."""
    weight = torch.zeros(1, dtype=torch.bfloat16)
    pieces = [torch.full((1,), 1.0, dtype=torch.bfloat16)] * 1024
    sums = GradientSum([weight])
    naive = torch.zeros(1, dtype=torch.bfloat16)
    for piece in pieces:
        sums.add([piece])
        naive += piece
    right = 1024.0
    (result,) = sums.result()
    assert result.dtype == torch.bfloat16
    assert result.item() == right
    assert naive.item() < right / 2


def test_sums_leave_the_gradients_they_got_as_they_were():
    shared = torch.ones(2)
    sums = GradientSum([torch.zeros(2), torch.zeros(2)])
    sums.add([shared, None])
    sums.add([shared, shared])
    sums.add([shared, None])
    first, second = sums.result()
    assert torch.equal(shared, torch.ones(2))
    assert torch.equal(first, 3 * shared)
    assert torch.equal(second, shared)


def test_stand_ins_for_gradients_added_elsewhere_are_not_summed():
    weight, bias = torch.zeros(2), torch.zeros(2)
    poison = torch.full((2,), float("nan"))
    sums = GradientSum([weight, bias], elsewhere=lambda tensor: tensor is weight)
    last = poison.clone()
    for stand_in in (poison, poison, last):
        sums.add([stand_in, torch.ones(2)])
    stand_in, right = sums.result()
    assert stand_in is last
    assert torch.equal(right, torch.full((2,), 3.0))


def peak(rows, count, inner=64):
    """Bytes of one forward and backward beyond input, output, weights and their gradients."""
    function, (x, gradient) = Gated(torch.float32, inner=inner), inputs(torch.float32, rows)
    tensors = [x, *function.parameters]
    with LiveBytes([*tensors, gradient]) as live:
        if count:
            out = chunked(function, x, function.parameters, count)
        else:
            out = function(x)
        found = gradients(out, tensors, gradient)
    assert live.live == out.nbytes + sum(each.nbytes for each in found), "what is left"
    return live.peak - live.live


def test_what_is_held_in_between_is_that_of_one_piece():
    rows = 512
    whole = peak(rows, 0)
    one_row = BATCH * (2 * 64) * 4
    assert whole > 3 * rows * one_row / 2, "the measure sees the intermediate activations"
    # As long a piece of a sequence four times as long holds no more than before.
    short, long = peak(rows, 16), peak(4 * rows, 64)
    assert long <= short * 1.02, (short, long)
    assert short <= whole / 8, (short, whole)
    assert short <= 6 * (rows / 16) * one_row, (short, one_row)
