# SPDX-License-Identifier: Apache-2.0
"""LM head and loss in pieces against logits made whole: values, gradients, memory, messages."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_seqpar.memory.cross_entropy import chunked_cross_entropy
from tests.support.live_bytes import LiveBytes
from tests.support.pool import GlooPool

ROWS, BATCH, HIDDEN, VOCABULARY = 7, 2, 5, 12
IGNORED = -100


@dataclasses.dataclass
class Case:
    """hidden `[s, b, h]`, head `[V, h]`, labels `[s, b]`, and weights `[s, b]` of the tokens."""

    hidden: torch.Tensor
    head: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor


def case(rows: int = ROWS, batch: int = BATCH, seed: int = 0, scale: float = 1.0) -> Case:
    """Every id is somebody's label; one label is ignored; a fifth of the tokens do not count."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randperm(rows * batch, generator=generator).view(rows, batch) % VOCABULARY
    labels[rows // 2, -1] = IGNORED
    return Case(
        scale * torch.randn(rows, batch, HIDDEN, dtype=torch.float64, generator=generator),
        torch.randn(VOCABULARY, HIDDEN, dtype=torch.float64, generator=generator),
        labels,
        torch.rand(rows, batch, dtype=torch.float64, generator=generator).sub(0.2).clamp(min=0),
    )


def leaf(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return values.detach().to(dtype, copy=True).requires_grad_()


def whole(made: Case, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """Truth: all logits at once, through autograd; in `dtype`, with the loss in fp32 or fp64."""
    hidden = leaf(made.hidden, dtype)
    head = leaf(made.head, dtype)
    logits = hidden @ head.t()
    wide = logits if dtype == torch.float64 else logits.float()
    # What Megatron makes of an ignored label: the largest logit in its logit's place, no gradient.
    found = wide.gather(-1, made.labels.clamp(min=0)[..., None])[..., 0]
    target = torch.where(made.labels == IGNORED, wide.detach().amax(-1), found)
    loss = wide.logsumexp(-1) - target
    (loss * made.weights.to(loss.dtype)).sum().backward()
    return {"loss": loss.detach(), "hidden": hidden.grad, "head": head.grad}


def pieces(
    made: Case, chunks: int, dtype: torch.dtype = torch.float64, **options: Any
) -> dict[str, torch.Tensor]:
    """Ours, in pieces."""
    hidden = leaf(made.hidden, dtype)
    head = leaf(made.head, dtype)
    out = chunked_cross_entropy(
        lambda piece: piece @ head.t(), hidden, made.labels, [head], chunks=chunks, **options
    )
    (out.loss * made.weights.to(out.loss.dtype)).sum().backward()
    return {"loss": out.loss.detach(), "hidden": hidden.grad, "head": head.grad}


def same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], bound=1e-10) -> None:
    assert got.keys() == expected.keys()
    for name, truth in expected.items():
        apart = (got[name] - truth).abs().max() / truth.abs().max()
        assert apart <= bound, (name, float(apart))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("chunks", range(1, ROWS + 2))
def test_any_number_of_pieces_gives_the_loss_and_gradients_of_one(chunks, batch):
    made = case(batch=batch)
    same(pieces(made, chunks), whole(made))


@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_any_length(rows, chunks, seed):
    made = case(rows, 1, seed)
    made.labels[0] = seed % VOCABULARY
    made.weights[0] = 1.0
    same(pieces(made, chunks), whole(made))


@pytest.mark.parametrize("chunks", [2, 3, 5, 7, 9])
def test_as_many_pieces_as_asked_for_and_two_products_each(chunks):
    """No tail is dropped, and the count is the one that was asked for."""
    made, lengths = case(), []
    head = made.head.requires_grad_()

    def project(piece):
        lengths.append(piece.shape[0])
        return piece @ head.t()

    out = chunked_cross_entropy(
        project, made.hidden.requires_grad_(), made.labels, [head], chunks=chunks
    )
    forward = list(lengths)
    out.loss.sum().backward()
    assert len(forward) == min(chunks, ROWS)
    assert sum(forward) == ROWS
    assert max(forward) - min(forward) <= 1
    assert lengths == forward * 2


def test_the_mean_is_over_tokens_and_not_over_pieces():
    """With the tokens that count all in the last piece, a mean of the pieces' means is off."""
    made = case(rows=6, batch=1)
    made.labels[:] = torch.arange(6)[:, None]
    made.weights[:] = torch.tensor([0, 0, 0, 0, 1, 1.0])[:, None] / 2
    got = pieces(made, 4)
    same(got, whole(made))
    mean = (got["loss"] * made.weights).sum()
    truth = torch.nn.functional.cross_entropy(
        (made.hidden @ made.head.t())[-2:, 0], made.labels[-2:, 0]
    )
    torch.testing.assert_close(mean, truth)


@pytest.mark.parametrize("chunks", [1, 5, 32])
def test_bf16_errs_no_more_than_twice_one_piece(chunks):
    made = case(rows=32, batch=2, scale=2.0)
    truth = whole(made)
    one, ours = whole(made, torch.bfloat16), pieces(made, chunks, torch.bfloat16)

    def error(result, name):
        return (result[name].double() - truth[name]).norm() / truth[name].norm()

    for name in truth:
        assert ours[name].dtype == one[name].dtype
        assert 0 < error(ours, name) <= 2 * error(one, name), name


def test_fp32_loss_of_huge_logits():
    made = case(scale=1e4)
    same(pieces(made, 3, torch.float32), whole(made), bound=1e-5)


def test_what_is_not_a_number_stays_one():
    made = case()
    made.hidden[4, 0, 0] = torch.nan
    lost = pieces(made, 3)["loss"].isnan()
    assert lost[4, 0]
    assert lost.sum() == 1


def test_predictions_are_the_first_largest_logits():
    made = case()
    made.head[7] = made.head[3]
    head = made.head
    for chunks in (1, 3, 8):
        out = chunked_cross_entropy(
            lambda piece: piece @ head.t(),
            made.hidden,
            made.labels,
            chunks=chunks,
            predictions=True,
        )
        assert torch.equal(out.predictions, (made.hidden @ head.t()).argmax(-1))
        assert not out.predictions.requires_grad


@pytest.mark.parametrize("frozen", ["hidden", "head", "both"])
def test_what_needs_no_gradient_gets_none(frozen):
    made = case()
    hidden = made.hidden.requires_grad_(frozen == "head")
    head = made.head.requires_grad_(frozen == "hidden")
    out = chunked_cross_entropy(
        lambda piece: piece @ head.t(), hidden, made.labels, [head], chunks=3
    )
    truth = whole(case())
    torch.testing.assert_close(out.loss.detach(), truth["loss"])
    assert out.loss.requires_grad == (frozen != "both")
    if frozen == "both":
        return
    (out.loss * made.weights).sum().backward()
    learns, other = (hidden, head) if frozen == "head" else (head, hidden)
    torch.testing.assert_close(learns.grad, truth["hidden" if frozen == "head" else "head"])
    assert other.grad is None


def test_a_parameter_that_is_not_used_gets_no_gradient():
    made, unused = case(), torch.ones(3, requires_grad=True)
    hidden = made.hidden.requires_grad_()
    out = chunked_cross_entropy(
        lambda piece: piece @ made.head.t(), hidden, made.labels, [unused], chunks=2
    )
    out.loss.sum().backward()
    assert unused.grad is None
    assert hidden.grad is not None


def test_evaluation_needs_no_gradient():
    made = case()
    head = made.head.requires_grad_()
    with torch.no_grad():
        out = chunked_cross_entropy(
            lambda piece: piece @ head.t(), made.hidden, made.labels, [head], chunks=3
        )
    assert not out.loss.requires_grad
    torch.testing.assert_close(out.loss, whole(case())["loss"])


def test_autocast_of_forward_holds_in_backward():
    made = case()
    hidden = made.hidden.float().requires_grad_()
    head = made.head.float().requires_grad_()
    dtypes = []

    def project(piece):
        dtypes.append((piece @ head.t()).dtype)
        return piece @ head.t()

    with torch.autocast("cpu", torch.bfloat16):
        out = chunked_cross_entropy(project, hidden, made.labels, [head], chunks=2)
    out.loss.sum().backward()
    assert dtypes == [torch.bfloat16] * 4
    assert head.grad.dtype == hidden.grad.dtype == torch.float32
    assert head.grad.abs().sum() > 0


def test_the_head_hears_of_its_gradient_once():
    """Data parallelism counts on one call a parameter, whatever the number of pieces and uses."""
    made, calls = case(), Counter()
    hidden = made.hidden.requires_grad_()
    head = made.head.requires_grad_()
    head.register_post_accumulate_grad_hook(lambda parameter: calls.update(["accumulated"]))
    head.register_hook(lambda gradient: calls.update(["gradient"]))
    first, second = (
        chunked_cross_entropy(
            lambda piece: piece @ head.t(), hidden, made.labels, [head], chunks=chunks
        )
        for chunks in (3, 5)
    )
    ((first.loss + second.loss) * made.weights).sum().backward()
    assert calls["accumulated"] == 1
    torch.testing.assert_close(head.grad, 2 * whole(case())["head"])


def footprint(rows: int, chunks: int, dtype: torch.dtype) -> LiveBytes:
    """What one forward and backward makes; `chunks` 0: all logits at once."""
    made = case(rows, 1)
    head = torch.randn(512, HIDDEN).to(dtype).requires_grad_()
    hidden = leaf(made.hidden, dtype)
    with LiveBytes([hidden, head, made.labels]) as live:
        if chunks:
            out = chunked_cross_entropy(
                lambda piece: piece @ head.t(), hidden, made.labels, [head], chunks=chunks
            ).loss
        else:
            logits = (hidden @ head.t()).float()
            labels = made.labels.clamp(min=0)
            out = logits.logsumexp(-1) - logits.gather(-1, labels[..., None])[..., 0]
        out.sum().backward()
    return live


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_the_whole_sequence_never_exist(dtype):
    rows, chunks, size = 256, 16, 512
    fp32_piece = rows // chunks * size * 4
    live = footprint(rows, chunks, dtype)
    assert live.largest <= fp32_piece
    # one piece in the logits' dtype and, for bf16, widened; beside it what is as large as the head,
    # and a few numbers a token
    head = size * HIDDEN
    small = head * (4 + 3 * dtype.itemsize) + rows * (8 * 4 + 4 * HIDDEN * dtype.itemsize)
    piece = fp32_piece + (rows // chunks * size * 2 if dtype == torch.bfloat16 else 0)
    assert live.peak <= piece + small
    assert footprint(rows, 0, dtype).largest >= rows * size * 4
    # four times the sequence in four times the pieces: only the numbers a token grow
    assert footprint(4 * rows, 4 * chunks, dtype).peak <= piece + small + 3 * rows * 80


class Reduced(torch.autograd.Function):
    """Identity whose gradient is summed over a group, as before a column-parallel layer."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        ALL_REDUCE(grad, group=ctx.group)
        return grad, None


class Gathered(torch.autograd.Function):
    """Shares of the first dimension joined over a group; the gradient is summed and shared out."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        ALL_REDUCE(grad, group=ctx.group)
        return grad.chunk(dist.get_world_size(ctx.group))[dist.get_rank(ctx.group)], None


ALL_REDUCE = dist.all_reduce
_groups: dict[str, Any] = {}


def split_vocabulary(rank: int, shared: bool, chunks: list[int], dtype: torch.dtype) -> None:
    """On ranks 1 and 2 of three, group ranks 0 and 1; shared: the sequence is split as well."""
    if "pair" not in _groups:
        _groups["pair"] = dist.new_group([1, 2])
    if rank == 0:
        return
    group, place = _groups["pair"], rank - 1
    made = case(rows=6)
    made.head[VOCABULARY // 2 + 1] = made.head[1]  # equal logits on both ranks
    truth = whole(made)
    for count in chunks:
        hidden = leaf(made.hidden.chunk(2)[place] if shared else made.hidden, dtype)
        head = leaf(made.head.chunk(2)[place], dtype)
        split, calls = Gathered if shared else Reduced, Counter()

        def counted(*args, calls=calls, **kwargs):
            calls[str(kwargs.get("op", "sum")).rsplit(".", 1)[-1].lower()] += 1
            return ALL_REDUCE(*args, **kwargs)

        dist.all_reduce = counted
        try:
            for predictions in (False, True):
                out = chunked_cross_entropy(
                    lambda piece, split=split, head=head: split.apply(piece, group) @ head.t(),
                    hidden,
                    made.labels,
                    [head],
                    chunks=count,
                    group=group,
                    predictions=predictions,
                )
            pieces_made = min(count, hidden.shape[0])
            assert calls["min"] == pieces_made
            assert calls["max"] == calls["sum"] == 2 * pieces_made
            assert calls.total() == 5 * pieces_made
            (out.loss * made.weights.to(out.loss.dtype)).sum().backward()
            assert calls.total() == 5 * pieces_made, "the softmax sends nothing in backward"
        finally:
            dist.all_reduce = ALL_REDUCE
        assert torch.equal(out.predictions, (made.hidden @ made.head.t()).argmax(-1))
        expected = {
            "loss": truth["loss"],
            "head": truth["head"].chunk(2)[place],
            "hidden": truth["hidden"].chunk(2)[place] if shared else truth["hidden"],
        }
        got = {"loss": out.loss.detach(), "head": head.grad, "hidden": hidden.grad}
        same(got, expected, 1e-10 if dtype == torch.float64 else 1e-5)


def masked_part(rank: int) -> None:
    """All logits of one rank are minus infinity, as those of padded ids may be."""
    group = dist.group.WORLD
    logits = torch.randn(5, 1, 4) if rank == 1 else torch.full((5, 1, 4), -torch.inf)
    labels = torch.arange(5)[:, None] % 4 + 4
    out = chunked_cross_entropy(
        lambda piece: logits[: piece.shape[0]].clone(),
        torch.zeros(5, 1, 1),
        labels,
        chunks=1,
        group=group,
    )
    if rank == 1:
        truth = torch.nn.functional.cross_entropy(logits[:, 0], labels[:, 0] - 4, reduction="none")
        torch.testing.assert_close(out.loss[:, 0], truth)


@pytest.fixture(scope="module")
def three():
    pool = GlooPool(3)
    yield pool
    pool.stop()


@pytest.mark.parametrize("shared", [False, True])
def test_vocabulary_over_two_ranks(three, shared):
    """Labels in both parts, TP and TP-SP; two all-reduces a piece, three with predictions."""
    three.run(split_vocabulary, shared, list(range(1, 8)), torch.float64)
    three.run(split_vocabulary, shared, [2], torch.float32)


def test_a_part_of_the_vocabulary_that_is_masked_out(three):
    three.run(masked_part)


@pytest.mark.parametrize("rows", [6, 8, 15])
def test_labels_must_fit(rows):
    made = case()
    labels = torch.zeros(rows, BATCH, dtype=torch.int64)
    with pytest.raises(ValueError, match="do not fit hidden states"):
        chunked_cross_entropy(lambda piece: piece, made.hidden, labels, chunks=2)


def test_logits_must_fit():
    made = case()
    with pytest.raises(ValueError, match=r"logits \(1, 2, 12\) where \(4, 2, 'V'\)"):
        chunked_cross_entropy(
            lambda piece: (piece @ made.head.t())[:1], made.hidden, made.labels, chunks=2
        )


def test_a_head_that_keeps_its_output_is_told():
    """Its logits are overwritten with their gradient, and tanh would need them."""
    made = case()
    hidden = made.hidden.requires_grad_()
    out = chunked_cross_entropy(
        lambda piece: (piece @ made.head.t()).tanh(), hidden, made.labels, chunks=2
    )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.sum().backward()
