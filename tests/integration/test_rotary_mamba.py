# SPDX-License-Identifier: Apache-2.0
"""Rotary tables and state-space layers see contiguous tokens; stock results without the axis."""

from __future__ import annotations

import pytest
import torch

from megatron_seqpar.config import SeqParConfig
from megatron_seqpar.errors import UnsupportedError
from megatron_seqpar.integration import install, state, uninstall
from tests.support.releases import at_least


class Group:
    """The two questions that rotary embeddings ask of a process group."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


@pytest.fixture
def installed():
    pytest.importorskip("megatron.core")
    install(SeqParConfig(sequence_parallel_size=3))
    yield
    uninstall()


@pytest.mark.parametrize("rank", range(3))
def test_rotary_positions_are_those_of_the_ranks_tokens(installed, rank):
    from megatron.core.models.common.embeddings import rope_utils, rotary_pos_embedding
    from megatron.core.models.common.embeddings import yarn_rotary_pos_embedding as yarn

    table = torch.arange(15.0).view(15, 1, 1, 1)
    for module in (rope_utils, rotary_pos_embedding, yarn):
        got = module.get_pos_emb_on_this_cp_rank(table, 0, Group(rank, 3))
        assert got.flatten().tolist() == list(range(5 * rank, 5 * rank + 5))
    with pytest.raises(UnsupportedError, match="12 and 15 are the nearest"):
        rope_utils.get_pos_emb_on_this_cp_rank(table[:14], 0, Group(rank, 3))


def test_state_space_layers_keep_the_order(installed):
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.ssm import mamba_context_parallel as mamba

    sequence = torch.arange(12.0).view(12, 1, 1)
    assert torch.equal(mamba._undo_attention_load_balancing(sequence, 3), sequence)
    assert torch.equal(mamba._redo_attention_load_balancing(sequence, 3), sequence)
    pack = PackedSeqParams(cu_seqlens_q=torch.tensor([0, 5, 12]))
    if at_least("0.17"):  # 0.16 numbers no tokens
        pack.total_tokens = 12
        pack.__post_init__()
        assert pack.seq_idx[0, [0, 4, 5, 11]].tolist() == [0, 0, 1, 1]  # resets the state
        assert torch.equal(mamba._undo_attention_load_balancing(sequence, 3, pack), sequence)
        pack.seq_idx = None
    with pytest.raises(UnsupportedError, match="packed_seq_params without seq_idx"):
        mamba._undo_attention_load_balancing(sequence, 3, pack)


def test_stock_order_without_the_axis(installed):
    from megatron.core.ssm import mamba_context_parallel as mamba

    state.set_config(SeqParConfig())
    sequence = torch.arange(6.0).view(6, 1, 1)
    mixed = mamba._redo_attention_load_balancing(sequence, 3)
    assert mixed.flatten().tolist() == [0.0, 5.0, 1.0, 4.0, 2.0, 3.0]
    assert torch.equal(mamba._undo_attention_load_balancing(mixed, 3), sequence)
