# SPDX-License-Identifier: Apache-2.0
"""What attention held is free when nobody refers to it, without help of the garbage collector.

Objects that refer to one another in a circle live until the collector runs, which counts objects
and not the bytes behind them: a whole layer's tensors would stay while the next ones are computed.
"""

from __future__ import annotations

import gc

import pytest
import torch

from megatron_seqpar.attention import Causal, dist_flash_attention
from megatron_seqpar.attention.transport import LocalTransport, ThreadTransport

TOKENS, HEADS, KV_HEADS, DIM = 32, 4, 2, 8


def attend(transport, schedule: str, repeated: bool) -> None:
    """Forward and backward of this rank's tokens; repeated: with a known output, as in replays."""
    heads = (HEADS, KV_HEADS, KV_HEADS)
    local = TOKENS // transport.size
    leaves = [torch.randn(1, local, count, DIM, requires_grad=True) for count in heads]

    def compute(known=None):
        return dist_flash_attention(
            *leaves,
            group=transport,
            mask=Causal(),
            schedule=schedule,
            kernel="cpu",
            seq_length=TOKENS,
            return_lse=True,
            known=known,
        )

    out, lse = compute()
    if repeated:
        out, _ = compute(known=(out.detach(), lse.detach()))
    out.sum().backward()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("repeated", [False, True], ids=["once", "repeated"])
@pytest.mark.parametrize(
    "schedule", ["balanced", "zigzag", "ring", "allgather", "ulysses", "solver"]
)
@pytest.mark.parametrize("size", [1, 4])
def test_no_tensor_stays_behind(size: int, schedule: str, repeated: bool) -> None:
    def rank(transport) -> None:
        attend(transport, schedule, repeated)

    def run() -> None:
        if size == 1:
            rank(LocalTransport())
        else:
            ThreadTransport.run(size, rank)

    run()  # what is cached from now on is
    gc.collect()
    gc.disable()
    try:
        before = {id(each) for each in gc.get_objects()}
        run()
        left = [
            tuple(each.shape)
            for each in gc.get_objects()
            if id(each) not in before and isinstance(each, torch.Tensor)
        ]
    finally:
        gc.enable()
    assert left == []
