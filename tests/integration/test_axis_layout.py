# SPDX-License-Identifier: Apache-2.0
"""The axis's groups against an enumeration of our own, in one process at any world size."""

from __future__ import annotations

import itertools

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_seqpar.config import SeqParConfig
from megatron_seqpar.errors import SeqParError, UnsupportedError
from megatron_seqpar.integration import install, uninstall

ps = pytest.importorskip("megatron.core.parallel_state")


@pytest.fixture
def fake_world():
    """Start rank `rank` of a world of `world` ranks that only this process simulates."""

    def start(rank: int, world: int) -> None:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)

    yield start
    if dist.is_initialized():
        ps.destroy_model_parallel()
        dist.destroy_process_group()
    uninstall()


def coordinates(rank: int, tp: int, sp: int, dp: int) -> tuple[int, int, int, int]:
    """(tensor, sequence, data, pipeline) coordinates of a global rank; tensor varies fastest."""
    rank, t = divmod(rank, tp)
    rank, s = divmod(rank, sp)
    p, d = divmod(rank, dp)
    return t, s, d, p


def expected_axes(tp: int, sp: int, dp: int, pp: int) -> dict[int, list[int]]:
    """Global rank -> the ranks that differ from it in the sequence coordinate only, in order."""
    world = tp * sp * dp * pp
    where = {rank: coordinates(rank, tp, sp, dp) for rank in range(world)}
    axes: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
    for rank, (t, s, d, p) in where.items():
        axes.setdefault((t, d, p), []).append((s, rank))
    return {
        rank: [member for _, member in sorted(axes[(t, d, p)])]
        for rank, (t, _, d, p) in where.items()
    }


LAYOUTS = [
    (tp, sp, dp, pp)
    for tp, sp, dp, pp in itertools.product((1, 2, 4), (2, 3, 8), (1, 2, 5), (1, 2, 4))
    if tp * sp * dp * pp <= 48
]
LARGE = [(8, 8, 4, 4), (4, 16, 16, 1), (1, 1024, 1, 1), (2, 7, 9, 8), (8, 32, 1, 4), (1, 2, 512, 1)]


def test_enumeration_partitions_the_world():
    axes = expected_axes(2, 3, 2, 2)
    assert axes[0] == [0, 2, 4]
    assert axes[7] == [7, 9, 11]
    assert sorted(itertools.chain(*{tuple(axis) for axis in axes.values()})) == list(range(24))


@pytest.mark.parametrize(("tp", "sp", "dp", "pp"), LAYOUTS + LARGE)
def test_group_layout(fake_world, tp, sp, dp, pp):
    world = tp * sp * dp * pp
    expected = expected_axes(tp, sp, dp, pp)
    install(SeqParConfig(sequence_parallel_size=sp))
    for rank in sorted({0, world // 2, world - 1}):
        fake_world(rank, world)
        ps.initialize_model_parallel(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            create_gloo_process_groups=False,
        )
        assert ps.get_sequence_parallel_global_ranks() == expected[rank]
        assert ps.get_sequence_parallel_world_size() == sp
        assert expected[rank][ps.get_sequence_parallel_rank()] == rank
        group = ps.get_sequence_parallel_group()
        assert dist.get_process_group_ranks(group) == expected[rank]
        assert group is not ps.get_context_parallel_group()
        assert ps.get_context_parallel_global_ranks() == expected[rank]
        assert ps.get_data_parallel_world_size() == dp
        assert ps.get_data_parallel_world_size(with_context_parallel=True) == dp * sp
        ps.destroy_model_parallel()
        assert ps.get_sequence_parallel_group(check_initialized=False) is None
        with pytest.raises(SeqParError, match="not initialised"):
            ps.get_sequence_parallel_group()
        dist.destroy_process_group()


def test_expert_parallelism_leaves_the_axis_alone(fake_world):
    install(SeqParConfig(sequence_parallel_size=4))
    fake_world(5, 16)
    ps.initialize_model_parallel(
        tensor_model_parallel_size=2, expert_model_parallel_size=4, create_gloo_process_groups=False
    )
    assert ps.get_sequence_parallel_global_ranks() == expected_axes(2, 4, 2, 1)[5]


def test_collection_carries_the_axis(fake_world):
    from megatron.core.process_groups_config import ProcessGroupCollection

    install(SeqParConfig(sequence_parallel_size=2))
    fake_world(0, 4)
    ps.initialize_model_parallel(create_gloo_process_groups=False)
    group = ps.get_sequence_parallel_group()
    assert ProcessGroupCollection.use_mpu_process_groups().sp is group
    assert ProcessGroupCollection.use_mpu_process_groups(["tp", "sp"]).sp is group


def test_size_one_makes_no_communicator(fake_world):
    install()
    fake_world(0, 4)
    ps.initialize_model_parallel(create_gloo_process_groups=False)
    assert ps.get_sequence_parallel_world_size() == 1
    assert ps.get_sequence_parallel_group() is ps.get_context_parallel_group()


def test_stock_context_parallelism_is_not_the_axis(fake_world):
    install()
    fake_world(3, 4)
    ps.initialize_model_parallel(context_parallel_size=2, create_gloo_process_groups=False)
    assert ps.get_context_parallel_world_size() == 2
    assert ps.get_sequence_parallel_global_ranks() == [3]
    assert ps.get_sequence_parallel_group() is None


def test_other_context_parallel_size_is_refused(fake_world):
    install(SeqParConfig(sequence_parallel_size=2))
    fake_world(0, 8)
    with pytest.raises(UnsupportedError, match="--context-parallel-size 4"):
        ps.initialize_model_parallel(context_parallel_size=4, create_gloo_process_groups=False)


def test_uninstall_takes_the_getters_away(fake_world):
    install(SeqParConfig(sequence_parallel_size=2))
    assert hasattr(ps, "get_sequence_parallel_rank")
    uninstall()
    assert not hasattr(ps, "get_sequence_parallel_rank")
    fake_world(0, 4)
    ps.initialize_model_parallel(create_gloo_process_groups=False)
    assert ps.get_context_parallel_world_size() == 1
