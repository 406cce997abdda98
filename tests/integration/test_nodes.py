# SPDX-License-Identifier: Apache-2.0
"""How an axis lies on nodes."""

from __future__ import annotations

import pytest

from megatron_seqpar.config import SeqParConfig
from megatron_seqpar.integration import nodes


@pytest.mark.parametrize(
    ("size", "tensor", "per_node", "expected"),
    [
        (8, 1, 8, 8),
        (16, 1, 8, 8),
        (16, 2, 8, 4),
        (4, 2, 8, 4),
        (2, 8, 8, 1),
        (2, 2, 8, 2),
        (12, 1, 8, 4),
        (6, 1, 4, 2),
        (3, 1, 2, 1),
        (5, 1, None, 5),
    ],
)
def test_node_size_of_every_axis(size, tensor, per_node, expected):
    """Tensor parallelism lies inside; all axes of the job lie alike."""
    for axis in range(4):
        for shard in range(tensor):
            start = axis * size * tensor + shard
            ranks = range(start, start + size * tensor, tensor)
            found = nodes.node_size(ranks, per_node)
            assert found % expected == 0
            if axis == 0:
                assert found == expected


def test_ranks_in_another_order():
    """Blocks must share a node whatever order Megatron made the groups in."""
    assert nodes.node_size([0, 1, 8, 9], 8) == 2
    assert nodes.node_size([0, 8, 1, 9], 8) == 1


def test_what_the_user_says_counts(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert nodes.of_axis(range(8), SeqParConfig(sequence_parallel_size=8)) == 4
    assert nodes.of_axis(range(8), SeqParConfig(sequence_parallel_size=8, node_size=2)) == 2
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert nodes.of_axis(range(8), SeqParConfig(sequence_parallel_size=8)) == 8
