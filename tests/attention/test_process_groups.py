# SPDX-License-Identifier: Apache-2.0
"""The same over real process groups (gloo), and under a group that is not the world."""

import torch
import torch.distributed as dist

from megatron_seqpar.attention import (
    Causal,
    Full,
    ProcessGroupTransport,
    TokenLayout,
    build_schedule,
)
from tests.support.pool import GlooPool
from tests.support.sharded import join, one_rank, token_layout
from tests.support.truth import Attention, attention, inputs, largest_difference

_GROUPS: dict[tuple[int, ...], dist.ProcessGroup] = {}


def _part(
    rank: int, ranks: tuple[int, ...], lengths: tuple[int, ...], causal: bool, options: dict
) -> tuple[Attention, int, int] | None:
    if ranks not in _GROUPS:
        _GROUPS[ranks] = dist.new_group(list(ranks))
    if rank not in ranks:
        return None
    transport = ProcessGroupTransport(_GROUPS[ranks])
    data = inputs(2, sum(lengths), 4, 2, 16)
    mask = Causal() if causal else Full()
    part = one_rank(data, lengths, transport, mask=mask, **options)
    return part, transport.counters.messages, transport.counters.bytes


def _check(pool: GlooPool, ranks: tuple[int, ...], lengths: tuple[int, ...], **options) -> None:
    for causal in (True, False):
        results = [r for r in pool.run(_part, ranks, lengths, causal, options) if r is not None]
        got = join([part for part, _, _ in results], token_layout(lengths, "contiguous"))
        truth = attention(inputs(2, sum(lengths), 4, 2, 16), causal=causal)
        assert max(largest_difference(got, truth).values()) < 1e-8
        plan = build_schedule(
            options.get("schedule", "auto"),
            size=len(ranks),
            lengths=lengths,
            mask=Causal() if causal else Full(),
            query_heads=4,
            kv_heads=2,
            head_dim=16,
            dtype=torch.float64,
            device="cpu",
            batch=2,
        )
        for group_rank, (_, messages, sent) in enumerate(results):
            both = ("forward", "backward")
            assert messages == sum(plan.messages_sent(group_rank, d) for d in both)
            assert sent == sum(plan.bytes_sent(group_rank, d, torch.float64, batch=2) for d in both)


def test_group_ranks_are_not_global_ranks(six_ranks: GlooPool) -> None:
    _check(six_ranks, (1, 3, 5), (16, 16, 16))
    _check(six_ranks, (1, 3, 5), (5, 11, 9), schedule="ring")


def test_the_whole_world_even_and_odd(six_ranks: GlooPool) -> None:
    _check(six_ranks, (0, 1, 2, 3, 4, 5), (8, 8, 8, 8, 8, 8))
    _check(six_ranks, (0, 1, 2, 3, 4), (9, 8, 8, 8, 8))
    _check(six_ranks, (4, 2), (13, 8), overlap=False)


def _default_group(rank: int) -> float:
    """`group=None` means the world; chunks of any length, told to nobody."""
    from megatron_seqpar.attention import dist_flash_attention
    from megatron_seqpar.attention.transport import transport_of

    data = inputs(1, 24, 2, 2, 8)
    truth = attention(data, causal=True)
    mine = slice(*TokenLayout.contiguous(6, lengths=(3, 6, 1, 4, 8, 2)).chunks[rank])
    out = dist_flash_attention(*(t[:, mine] for t in data[:3]))
    assert transport_of(None) is transport_of(dist.group.WORLD)
    assert isinstance(out, torch.Tensor)
    return (out - truth.out[:, mine]).abs().max().item()


def test_the_default_group_is_the_world(six_ranks: GlooPool) -> None:
    assert max(six_ranks.run(_default_group)) < 1e-8
