# SPDX-License-Identifier: Apache-2.0
"""Run `dist_flash_attention` on every rank of a group of threads and put the pieces together."""

from __future__ import annotations

import torch

from megatron_seqpar.attention import (
    Counters,
    ThreadTransport,
    TokenLayout,
    Transport,
    dist_flash_attention,
)

from .truth import Attention, Inputs


def token_layout(lengths: tuple[int, ...], name: str) -> TokenLayout:
    """The token layout of that name for these ranks; zigzag takes the total only."""
    if name == "zigzag":
        return TokenLayout.zigzag(len(lengths), sum(lengths))
    return TokenLayout.contiguous(len(lengths), lengths=lengths)


def positions(layout: TokenLayout, rank: int) -> torch.Tensor:
    """Global positions of a rank's tokens, in the order in which it holds them."""
    return torch.cat([torch.arange(*span) for span in layout.pieces[rank]])


def one_rank(
    data: Inputs,
    lengths: tuple[int, ...],
    transport: Transport,
    **options: object,
) -> Attention:
    """This rank's part of the attention of `data`, forward and backward."""
    return one_rank_with_sink(data, lengths, transport, None, **options)[0]


def one_rank_with_sink(
    data: Inputs,
    lengths: tuple[int, ...],
    transport: Transport,
    sink: torch.Tensor | None,
    **options: object,
) -> tuple[Attention, torch.Tensor | None]:
    """The same with a sink, and this rank's share of the sink's gradient."""
    name = str(options.get("token_layout", "contiguous"))
    mine = positions(token_layout(lengths, name), transport.rank)
    q, k, v = (t[:, mine].detach().clone().requires_grad_() for t in data[:3])
    sink = None if sink is None else sink.detach().clone().requires_grad_()
    out, lse = dist_flash_attention(
        q, k, v, group=transport, lengths=lengths, return_lse=True, sink=sink, **options
    )
    out.backward(data.dout[:, mine])
    assert q.grad is not None
    assert k.grad is not None
    assert v.grad is not None
    part = Attention(out.detach(), lse, q.grad, k.grad, v.grad)
    return part, None if sink is None else sink.grad


def join(parts: list[Attention], layout: TokenLayout) -> Attention:
    """Whole tensors in the order of the sequence from the ranks' parts."""
    order = torch.argsort(torch.cat([positions(layout, rank) for rank in range(layout.size)]))

    def whole(name: str) -> torch.Tensor:
        dim = 2 if name == "lse" else 1
        return torch.cat([getattr(part, name) for part in parts], dim).index_select(dim, order)

    return Attention(*(whole(name) for name in Attention._fields))


def on_threads(
    data: Inputs, lengths: tuple[int, ...], **options: object
) -> tuple[Attention, list[Counters]]:
    """Attention over `len(lengths)` threads; the joined result and every rank's counters."""

    def work(transport: ThreadTransport) -> tuple[Attention, Counters]:
        return one_rank(data, lengths, transport, **options), transport.counters

    results = ThreadTransport.run(len(lengths), work)
    layout = token_layout(lengths, str(options.get("token_layout", "contiguous")))
    return join([part for part, _ in results], layout), [counters for _, counters in results]
