# SPDX-License-Identifier: Apache-2.0
"""Distributed attention against single-device truth: values, gradients, counts, precision."""

import itertools
import math

import pytest
import torch

from megatron_seqpar.attention import (
    Causal,
    Full,
    LocalTransport,
    Mask,
    ThreadTransport,
    TokenLayout,
    build_schedule,
    dist_flash_attention,
    even_lengths,
)
from megatron_seqpar.attention.execute import output_with_delta
from megatron_seqpar.attention.kernels import TileCall, select
from megatron_seqpar.errors import KernelError, ScheduleError, UnsupportedError
from tests.support.sharded import on_threads, one_rank
from tests.support.truth import Attention, Inputs, attention, inputs, largest_difference

HEADS = [pytest.param(4, kv, id=name) for kv, name in ((4, "mha"), (2, "gqa"), (1, "mqa"))]


def _ragged(size: int) -> tuple[int, ...]:
    return tuple(3 + (5 * rank + 2) % 7 for rank in range(size))


@pytest.mark.parametrize("mask", [Causal(), Full()], ids=["causal", "full"])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("size", [*range(1, 10), 16])
def test_fp64_equals_one_device(size: int, heads: int, kv_heads: int, mask: Mask) -> None:
    """Both schedules, three ways to cut the sequence, batch 1 and 3; counts as scheduled."""
    for lengths, batch in itertools.product(
        {even_lengths(8 * size, size), even_lengths(7 * size + size // 2, size), _ragged(size)},
        (1, 3),
    ):
        data = inputs(batch, sum(lengths), heads, kv_heads, 16)
        truth = attention(data, causal=mask == Causal())
        for name in ("balanced", "ring"):
            got, counters = on_threads(data, lengths, mask=mask, schedule=name)
            for field, difference in largest_difference(got, truth).items():
                assert difference < 1e-8, (name, lengths, batch, field)
            plan = build_schedule(
                name, size=size, lengths=lengths, mask=mask, query_heads=heads, kv_heads=kv_heads,
                head_dim=16,
            )  # fmt: skip
            for rank, counted in enumerate(counters):
                directions = ("forward", "backward")
                assert counted.bytes == sum(
                    plan.bytes_sent(rank, d, torch.float64, batch=batch) for d in directions
                )
                assert counted.messages == sum(plan.messages_sent(rank, d) for d in directions)
                tiles = sum(len(step.tiles) for step in plan.steps(rank))
                assert (counted.forward_calls, counted.backward_calls) == (tiles, tiles)


def _error_ratio(got: Attention, alone: Attention, truth: Attention) -> dict[str, float]:
    """Our mean error over the single-device kernel's own mean error, field by field."""

    def error(x: torch.Tensor, y: torch.Tensor) -> float:
        return (x.double() - y).abs().mean().item()

    fields = zip(Attention._fields, got, alone, truth, strict=True)
    return {name: error(a, t) / error(b, t) for name, a, b, t in fields}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [2, 3, 8, 16])
@pytest.mark.parametrize("name", ["balanced", "ring"])
def test_low_precision_errs_no_more_than_twice_one_device(
    name: str, size: int, dtype: torch.dtype
) -> None:
    """Also the regression for partials that compound in bf16: the ratio must not grow with size."""
    data = inputs(1, 512, 4, 2, 32, dtype)
    truth = attention(data, causal=True)
    got, _ = on_threads(data, even_lengths(512, size), schedule=name)
    alone = one_rank(data, (512,), LocalTransport())
    assert all(t.dtype == dtype for t in (got.out, got.dq, got.dk, got.dv))
    assert got.lse.dtype == torch.float32
    for field, ratio in _error_ratio(got, alone, truth).items():
        assert ratio <= 2, (field, ratio)


@pytest.mark.parametrize("mask", [Causal(), Full()], ids=["causal", "full"])
def test_extreme_scores_do_not_overflow_the_merge(mask: Mask) -> None:
    data = inputs(1, 48, 2, 2, 16, torch.float32)
    data = data._replace(q=data.q * 60, k=data.k * 60)  # scores in the thousands
    truth = attention(data, causal=mask == Causal())
    got, _ = on_threads(data, even_lengths(48, 4), mask=mask)
    assert all(torch.isfinite(field).all() for field in got)
    assert torch.allclose(got.out.double(), truth.out, atol=1e-3)
    assert torch.allclose(got.lse.double(), truth.lse, rtol=1e-5)


def test_results_are_repeatable_bit_by_bit() -> None:
    data = inputs(2, 60, 4, 2, 16, torch.bfloat16)
    first, _ = on_threads(data, (9, 14, 11, 17, 9), deterministic=True)
    again, _ = on_threads(data, (9, 14, 11, 17, 9), deterministic=True)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_overlap_changes_nothing_but_time() -> None:
    data = inputs(1, 64, 4, 2, 16, torch.float32)
    overlapped, sent = on_threads(data, even_lengths(64, 4))
    waiting, also_sent = on_threads(data, even_lengths(64, 4), overlap=False)
    assert all(torch.equal(a, b) for a, b in zip(overlapped, waiting, strict=True))
    assert sent == also_sent


@pytest.mark.parametrize("lengths", [(8, 8, 8), (5, 12, 7), (1, 2, 21)])
def test_ranks_find_out_lengths_that_nobody_told_them(lengths: tuple[int, ...]) -> None:
    data = inputs(2, 24, 4, 2, 16)
    truth = attention(data, causal=True)
    chunks = TokenLayout.contiguous(len(lengths), lengths=lengths).chunks

    def work(transport: ThreadTransport) -> torch.Tensor:
        mine = slice(*chunks[transport.rank])
        out = dist_flash_attention(*(t[:, mine] for t in data[:3]), group=transport, mask="causal")
        assert isinstance(out, torch.Tensor)
        return out

    assert (torch.cat(ThreadTransport.run(3, work), 1) - truth.out).abs().max() < 1e-8


@pytest.mark.parametrize("tensor_layout", ["bshd", "sbhd", "bhsd"])
def test_tensor_layouts_and_strides(tensor_layout: str) -> None:
    """Strided q, k, v as they come out of one projection, in every order of dims."""
    order = {"bshd": (0, 1, 2, 3), "sbhd": (1, 0, 2, 3), "bhsd": (0, 2, 1, 3)}[tensor_layout]
    data = inputs(2, 24, 4, 4, 16)
    truth = attention(data, causal=True)

    def work(transport: ThreadTransport) -> Attention:
        mine = slice(12 * transport.rank, 12 * transport.rank + 12)
        packed = torch.cat([t[:, mine] for t in data[:3]], dim=-1).permute(order)
        packed = packed.contiguous().requires_grad_()
        out, lse = dist_flash_attention(
            *packed.split(16, dim=-1), group=transport, tensor_layout=tensor_layout, return_lse=True
        )
        out.backward(data.dout[:, mine].permute(order))
        assert packed.grad is not None
        grads = (g.permute(order) for g in packed.grad.split(16, dim=-1))
        return Attention(out.detach().permute(order), lse, *grads)

    parts = ThreadTransport.run(2, work)
    for name, *pieces, expected in zip(Attention._fields, *parts, truth, strict=True):
        joined = torch.cat(pieces, 2 if name == "lse" else 1)
        assert (joined - expected).abs().max() < 1e-10, name


def test_softmax_scale_is_used_in_both_passes() -> None:
    data = inputs(1, 40, 2, 2, 16)
    truth = attention(data, causal=True, scale=0.7)
    got, _ = on_threads(data, even_lengths(40, 4), softmax_scale=0.7)
    assert max(largest_difference(got, truth).values()) < 1e-8


def test_a_known_result_is_replayed_without_computing_or_sending() -> None:
    data = inputs(1, 48, 4, 2, 16)
    truth = attention(data, causal=True)

    def work(transport: ThreadTransport) -> tuple[Attention, int, int]:
        mine = slice(16 * transport.rank, 16 * transport.rank + 16)
        q, k, v = (t[:, mine].clone().requires_grad_() for t in data[:3])
        with torch.no_grad():
            known = dist_flash_attention(q, k, v, group=transport, return_lse=True)
        before = transport.counters.bytes, transport.counters.forward_calls
        out, lse = dist_flash_attention(q, k, v, group=transport, return_lse=True, known=known)
        assert (transport.counters.bytes, transport.counters.forward_calls) == before
        out.backward(data.dout[:, mine])
        assert q.grad is not None
        assert k.grad is not None
        assert v.grad is not None
        return Attention(out.detach(), lse, q.grad, k.grad, v.grad)

    parts = ThreadTransport.run(3, work)
    for name, *pieces, expected in zip(Attention._fields, *parts, truth, strict=True):
        assert (torch.cat(pieces, 2 if name == "lse" else 1) - expected).abs().max() < 1e-8, name


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e20])
def test_the_stand_in_output_has_the_asked_delta(size: float) -> None:
    dout = torch.randn(2, 5, 3, 8, dtype=torch.float32) * size
    dout[0, 0] = 0
    out = torch.randn(2, 5, 3, 8)
    delta = (dout.double() * out.double()).sum(-1).transpose(1, 2).float()
    stand_in = output_with_delta(dout, delta)
    assert torch.isfinite(stand_in).all()
    again = (dout.double() * stand_in.double()).sum(-1).transpose(1, 2)
    assert torch.allclose(again, delta.double(), rtol=1e-4, atol=1e-6 * size)
    assert (stand_in.norm(dim=-1) <= out.norm(dim=-1) * (1 + 1e-5)).all()


def test_the_stand_in_output_gives_the_kernel_the_same_gradients() -> None:
    data = inputs(1, 64, 2, 2, 32)
    _, kernel = select("cpu", device=torch.device("cpu"), dtype=torch.float64, head_dim=32)
    call = TileCall(32**-0.5, high=0)
    out, lse = kernel.forward(*data[:3], call)
    delta = (data.dout * out).sum(-1).transpose(1, 2)
    true = kernel.backward(data.dout, *data[:3], out, lse, call)
    ours = kernel.backward(data.dout, *data[:3], output_with_delta(data.dout, delta), lse, call)
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(true, ours, strict=True))


def _refused(data: Inputs, **options: object) -> None:
    dist_flash_attention(*data[:3], group=LocalTransport(), **options)


def test_bad_input_is_refused_by_name() -> None:
    data = inputs(1, 8, 4, 2, 16)
    with pytest.raises(ScheduleError, match=r"schedule='spiral' is unknown; use one of auto, bal"):
        _refused(data, schedule="spiral")
    with pytest.raises(KernelError, match=r"kernel='magic' is unknown; use one of auto, "):
        _refused(data, kernel="magic")
    with pytest.raises(KernelError, match=r"kernel='aten': serves cuda tensors, not cpu; use "):
        _refused(data, kernel="aten")
    with pytest.raises(ScheduleError, match=r"mask='window' is unknown; use one of causal, full"):
        _refused(data, mask="window")
    with pytest.raises(UnsupportedError, match="token_layout='striped'"):
        _refused(data, token_layout="striped")
    with pytest.raises(UnsupportedError, match="tensor_layout='hsbd'"):
        _refused(data, tensor_layout="hsbd")
    with pytest.raises(UnsupportedError, match="rank 0 of 1 holds 8 tokens, but the contig"):
        _refused(data, seq_length=9)
    with pytest.raises(UnsupportedError, match="needs 4 dims"):
        _refused(data._replace(q=data.q[0]))
    with pytest.raises(UnsupportedError, match="multiple of the heads of k and v"):
        _refused(inputs(1, 8, 4, 3, 16))
    with pytest.raises(UnsupportedError, match="share dtype and device"):
        _refused(data._replace(k=data.k.float()))
    with pytest.raises(UnsupportedError, match="batch and token dims"):
        _refused(data._replace(k=data.k[:, :4], v=data.v[:, :4]))
    with pytest.raises(UnsupportedError, match="batch, heads and head dims must be at least 1"):
        _refused(inputs(0, 8, 4, 2, 16))
    for scale in (0.0, -0.125, math.nan):
        with pytest.raises(UnsupportedError, match=f"softmax_scale={scale} must be above 0"):
            _refused(data, softmax_scale=scale)
    with pytest.raises(UnsupportedError, match=r"softcap=-30.0 must be above 0, or 0 for none"):
        _refused(data, softcap=-30.0)
    for sink in (torch.zeros(1), torch.zeros(2), torch.zeros(4, 1), torch.zeros(4, device="meta")):
        with pytest.raises(UnsupportedError, match=r"give one score a query head, \(4,\) on cpu"):
            _refused(data, sink=sink)


def test_a_failing_rank_ends_the_others() -> None:
    data = inputs(1, 8, 2, 2, 8)

    def work(transport: ThreadTransport) -> None:
        if transport.rank == 2:
            raise ValueError("rank 2 is out of memory")
        one_rank(data, (2, 2, 2, 2), transport)

    with pytest.raises(ValueError, match="rank 2 is out of memory"):
        ThreadTransport.run(4, work)
