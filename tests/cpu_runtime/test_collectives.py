# SPDX-License-Identifier: Apache-2.0
"""Collectives on gloo under the runtime: averages are right, also inside a coalescing manager."""

from pathlib import Path

from tests.cpu_runtime.fresh_process import run_together


def average_and_sum(rank: int, size: int, store: str) -> tuple[list[float], list[float]]:
    import torch

    from megatron_seqpar import cpu_runtime

    for each in cpu_runtime.units().values():
        each.apply()
    dist = torch.distributed
    dist.init_process_group("nccl", store=dist.FileStore(store, size), rank=rank, world_size=size)
    dist.barrier(device_ids=[torch.cuda.current_device()])
    alone = torch.tensor([1.0 + rank], device="cuda")
    dist.all_reduce(alone, op=dist.ReduceOp.AVG)
    tensors = [torch.tensor([1.0 + rank]), torch.tensor([10.0 * rank])]
    with dist.distributed_c10d._coalescing_manager(async_ops=True) as manager:
        for tensor in tensors:
            dist.all_reduce(tensor, op=dist.ReduceOp.AVG)
    manager.wait()
    parts = torch.arange(4.0) + rank
    mine = torch.empty(2)
    dist.reduce_scatter_tensor(mine, parts, op=dist.ReduceOp.AVG)
    dist.destroy_process_group()
    return [alone.item(), *(t.item() for t in tensors)], mine.tolist()


def test_averages_are_gloos_own(tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    results = run_together([(average_and_sum, (rank, 2, store)) for rank in range(2)])
    assert [averages for averages, _ in results] == [[1.5, 1.5, 5.0]] * 2
    assert [mine for _, mine in results] == [[0.5, 1.5], [2.5, 3.5]]
