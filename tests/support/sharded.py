# SPDX-License-Identifier: Apache-2.0
"""Run `dist_flash_attention` on every rank of a group of threads and put the pieces together."""

from __future__ import annotations

import torch

from megatron_seqpar.attention import (
    ContiguousLayout,
    Counters,
    ThreadTransport,
    Transport,
    dist_flash_attention,
)

from .truth import Attention, Inputs


def one_rank(
    data: Inputs, lengths: tuple[int, ...], transport: Transport, **options: object
) -> Attention:
    """This rank's part of the attention of `data`, forward and backward."""
    mine = slice(*ContiguousLayout(lengths).chunks[transport.rank])
    q, k, v = (t[:, mine].detach().clone().requires_grad_() for t in data[:3])
    out, lse = dist_flash_attention(
        q, k, v, group=transport, lengths=lengths, return_lse=True, **options
    )
    out.backward(data.dout[:, mine])
    assert q.grad is not None
    assert k.grad is not None
    assert v.grad is not None
    return Attention(out.detach(), lse, q.grad, k.grad, v.grad)


def join(parts: list[Attention]) -> Attention:
    """Whole tensors from the ranks' parts (lse has its tokens in the last dim)."""
    fields = zip(Attention._fields, zip(*parts, strict=True), strict=True)
    return Attention(*(torch.cat(pieces, 2 if n == "lse" else 1) for n, pieces in fields))


def on_threads(
    data: Inputs, lengths: tuple[int, ...], **options: object
) -> tuple[Attention, list[Counters]]:
    """Attention over `len(lengths)` threads; the joined result and every rank's counters."""

    def work(transport: ThreadTransport) -> tuple[Attention, Counters]:
        return one_rank(data, lengths, transport, **options), transport.counters

    results = ThreadTransport.run(len(lengths), work)
    return join([part for part, _ in results]), [counters for _, counters in results]
