# SPDX-License-Identifier: Apache-2.0
"""Every schedule x mask it claims, over ranks, against one device in fp64; counts as scheduled."""

import re
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_seqpar.attention import (
    Causal,
    Counters,
    Documents,
    Full,
    LocalTransport,
    Mask,
    Prefix,
    Ranges,
    Schedule,
    SlidingWindow,
    ThreadTransport,
    build_schedule,
    dist_flash_attention,
    even_lengths,
)
from megatron_seqpar.attention.schedules import BUILDERS
from megatron_seqpar.errors import ScheduleError
from tests.support.masks import masks
from tests.support.sharded import join, on_threads, one_rank_with_sink, token_layout
from tests.support.truth import Attention, Inputs, attention, inputs, largest_difference, with_sink

S = 46
MASKS: dict[str, Mask] = {
    "causal": Causal(),
    "full": Full(),
    "window": SlidingWindow(9),
    "two-sided window": SlidingWindow(5, 3),
    "window with sinks": SlidingWindow(6, 0, 3),
    "prefix": Prefix(17),
    # one token, longer than a chunk, padding at the end
    "documents": Documents((0, 13, 14, 37, 41)),
    "documents with windows": Documents((0, 12, 40), SlidingWindow(5)),
    "ranges": Ranges.of(
        [((0, 20), (0, 20), "causal"), ((20, 46), (5, 30), "full"), ((20, 46), (30, 46), "inverse")]
    ),
}
SIZES = (1, 2, 3, 4, 5, 6, *(pytest.param(p, marks=pytest.mark.slow) for p in (7, 8, 16)))
HEADS = [pytest.param(4, kv, id=name) for kv, name in ((4, "mha"), (2, "gqa"), (1, "mqa"))]


def _ragged(size: int) -> tuple[int, ...]:
    """Chunks of very different lengths, S tokens together."""
    shares = [1 + 5 * rank % 7 for rank in range(size)]
    cuts = [round(S * sum(shares[:rank]) / sum(shares)) for rank in range(size + 1)]
    return tuple(b - a for a, b in pairwise(cuts))


def _variants(size: int, turn: int | None = None) -> list[tuple[tuple[int, ...], str]]:
    """Ways to cut the sequence; with `turn`, ragged chunks and one of the two others in turn."""
    even = even_lengths(S, size)
    others = [(even, "contiguous"), (even, "zigzag")]
    ragged = (_ragged(size), "contiguous")
    return [ragged, *others] if turn is None else [ragged, others[turn % 2]]


def _node_sizes(name: str, size: int) -> list[int]:
    """For a two-level schedule every way to make nodes that it serves (of 16 ranks: one)."""
    if "+" not in name:
        return [size]
    return [4] if size == 16 else [m for m in range(2, size) if size % m == 0]


def _claims(name: str, mask: Mask, layout: str) -> bool:
    """`balanced` is a rule for whole chunks under whole masks; all others serve everything."""
    return "balanced" not in name or (mask.name in ("causal", "full") and layout == "contiguous")


def _as_scheduled(plan: Schedule, counters: list[Counters], batch: int) -> None:
    for rank, counted in enumerate(counters):
        both = ("forward", "backward")
        assert counted.bytes == sum(
            plan.bytes_sent(rank, d, torch.float64, batch=batch) for d in both
        )
        assert counted.messages == sum(plan.messages_sent(rank, d) for d in both)
        tiles = sum(len(step.tiles) for step in plan.steps(rank))
        assert (counted.forward_calls, counted.backward_calls) == (tiles, tiles)


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", BUILDERS)
def test_fp64_equals_one_device(name: str, size: int, heads: int, kv_heads: int) -> None:
    """All masks that the schedule claims, even and ragged chunks and zigzag; or a refusal."""
    data = inputs(1, S, heads, kv_heads, 8, dv=6)
    served = 0
    for turn, (label, mask) in enumerate(MASKS.items()):
        truth = attention(data, mask=mask)
        for lengths, layout in _variants(size, None if size <= 4 else turn):
            for node_size in _node_sizes(name, size):
                case = label, lengths, layout, node_size
                options = {"mask": mask, "schedule": name, "node_size": node_size}
                if not _claims(name, mask, layout):
                    with pytest.raises(ScheduleError, match=f"'{re.escape(name)}' does not serve"):
                        on_threads(data, lengths, token_layout=layout, **options)
                    continue
                plan = build_schedule(
                    name, layout=token_layout(lengths, layout), mask=mask, query_heads=heads,
                    kv_heads=kv_heads, head_dim=8, value_dim=6, node_size=node_size,
                )  # fmt: skip
                got, counters = on_threads(data, lengths, token_layout=layout, **options)
                assert max(largest_difference(got, truth).values()) < 1e-8, case
                _as_scheduled(plan, counters, 1)
                served += 1
    assert served or not _node_sizes(name, size)


@settings(max_examples=80, deadline=None)
@given(
    masks(S),
    st.sampled_from(list(BUILDERS)),
    st.sampled_from([1, 2, 3, 4, 6]),
    st.sampled_from([(4, 4), (4, 2), (5, 1), (6, 3)]),
    st.integers(0, 2),
    st.integers(0, 10),
)
def test_the_space_of_masks(
    mask: Mask, name: str, size: int, heads: tuple[int, int], variant: int, seed: int
) -> None:
    node_sizes = _node_sizes(name, size)
    lengths, layout = _variants(size)[variant]
    if not node_sizes or not _claims(name, mask, layout):
        return
    data = inputs(2, S, *heads, 8, seed=seed)
    got, _ = on_threads(
        data, lengths, mask=mask, schedule=name, token_layout=layout, node_size=node_sizes[0]
    )
    assert max(largest_difference(got, attention(data, mask=mask)).values()) < 1e-8


@pytest.mark.parametrize("name", ["zigzag", "allgather", "ulysses", "ring"])
def test_every_sample_of_a_batch_may_have_its_own_mask(name: str) -> None:
    each: tuple[Mask, ...] = (Documents((0, 13, 40)), Causal(), SlidingWindow(4))
    data = inputs(3, S, 4, 2, 8)
    parts = [
        attention(Inputs(*(t[i : i + 1] for t in data)), mask=mask) for i, mask in enumerate(each)
    ]
    truth = Attention(*(torch.cat(field) for field in zip(*parts, strict=True)))
    for size in (1, 2, 3, 4):
        for layout in ("contiguous", "zigzag"):
            got, _ = on_threads(
                data, even_lengths(S, size), mask=each, schedule=name, token_layout=layout
            )
            assert max(largest_difference(got, truth).values()) < 1e-8, (size, layout)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_sink_adds_to_every_denominator(size: int) -> None:
    """Also where a query sees nothing but the sink; and the sink's own gradient, summed up."""
    for mask in (Causal(), Documents((0, 13, 30)), SlidingWindow(5)):
        data, sink = inputs(2, S, 4, 2, 8), torch.tensor([0.3, -1.0, 2.0, 30.0]).double()
        truth, gradient = with_sink(data, mask, sink)
        lengths = even_lengths(S, size)

        def work(
            transport: ThreadTransport,
            mask: Mask = mask,
            data: Inputs = data,
            sink: torch.Tensor = sink,
            lengths: tuple[int, ...] = lengths,
        ) -> tuple[Attention, torch.Tensor | None]:
            return one_rank_with_sink(data, lengths, transport, sink, mask=mask)

        parts = ThreadTransport.run(size, work)
        got = join([part for part, _ in parts], token_layout(lengths, "contiguous"))
        assert max(largest_difference(got, truth).values()) < 1e-8
        shares = [share for _, share in parts if share is not None]
        assert gradient is not None
        assert (torch.stack(shares).sum(0) - gradient).abs().max() < 1e-8


@pytest.mark.parametrize("mask", [Causal(), Documents((0, 13, 30)), SlidingWindow(5)])
def test_capped_scores(mask: Mask) -> None:
    data = inputs(1, S, 4, 2, 8)
    data = data._replace(q=data.q * 8)
    truth = attention(data, mask=mask, softcap=5.0)
    assert largest_difference(attention(data, mask=mask), truth)["out"] > 1e-2
    for name in ("zigzag", "ulysses", "allgather"):
        got, _ = on_threads(data, even_lengths(S, 3), mask=mask, softcap=5.0, schedule=name)
        assert max(largest_difference(got, truth).values()) < 1e-8, name


@pytest.mark.parametrize("name", ["balanced", "zigzag", "ulysses"])
@pytest.mark.parametrize(("dim", "value_dim"), [(256, 256), (192, 128), (40, 72)])
def test_large_and_unequal_head_dims(name: str, dim: int, value_dim: int) -> None:
    data = inputs(2, 20, 4, 2, dim, dv=value_dim)
    got, _ = on_threads(data, (6, 7, 7), schedule=name)
    assert max(largest_difference(got, attention(data, causal=True)).values()) < 1e-8


def test_a_known_result_of_a_batch_of_masks_is_replayed() -> None:
    each = (Documents((0, 13, 40)), Causal())
    data = inputs(2, S, 4, 2, 8)
    q, k, v = (t.clone().requires_grad_() for t in data[:3])
    transport = LocalTransport()
    options = {"group": transport, "mask": each, "return_lse": True, "tensor_layout": "bshd"}
    with torch.no_grad():
        known = dist_flash_attention(q, k, v, **options)
    calls = transport.counters.forward_calls
    out, lse = dist_flash_attention(q, k, v, known=known, **options)
    assert transport.counters.forward_calls == calls
    assert torch.equal(out, known[0])
    assert torch.equal(lse, known[1])
    out.backward(data.dout)
    for i, mask in enumerate(each):
        truth = attention(Inputs(*(t[i : i + 1] for t in data)), mask=mask)
        assert q.grad is not None
        assert (q.grad[i] - truth.dq[0]).abs().max() < 1e-8
