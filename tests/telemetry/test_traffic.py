# SPDX-License-Identifier: Apache-2.0
"""Three gloo ranks; what each operation sends is worked out by hand from the convention."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed import all_reduce as copied_by_name
from torch.distributed import isend as isend_by_name

from megatron_seqpar.telemetry.traffic import METHODS, TrafficMeter
from tests.support.pool import GlooPool

SIZE = 3


@pytest.fixture(scope="module")
def pool() -> Iterator[GlooPool]:
    pool = GlooPool(SIZE)
    yield pool
    pool.stop()


def floats(count: int) -> torch.Tensor:
    return torch.ones(count, dtype=torch.float32)


def operation(name: str, rank: int) -> None:
    to, source = (rank + 1) % SIZE, (rank - 1) % SIZE
    if name == "all_reduce":
        dist.all_reduce(floats(6))
    elif name == "all_reduce, copied by name":
        copied_by_name(floats(6))
    elif name == "all_reduce, coalesced":
        with dist._coalescing_manager(async_ops=True) as work:
            dist.all_reduce(one := floats(3))
            dist.all_reduce(two := floats(3))
        work.wait()
        assert one[0] == two[0] == SIZE
    elif name == "all_gather":
        dist.all_gather([floats(6) for _ in range(SIZE)], floats(6))
    elif name == "all_gather_into_tensor":
        dist.all_gather_into_tensor(floats(18), floats(6))
    elif name == "_all_gather_base":
        dist._all_gather_base(floats(18), floats(6))
    elif name == "reduce_scatter":
        dist.reduce_scatter(floats(6), [floats(6) for _ in range(SIZE)])
    elif name == "reduce_scatter_tensor":
        dist.reduce_scatter_tensor(floats(6), floats(18))
    elif name == "all_to_all_single":
        dist.all_to_all_single(floats(18), floats(18))
    elif name.startswith("all_to_all_single, uneven"):
        splits = [1, 2, 3]
        received = splits[rank] * SIZE
        given = np.array(splits) if name.endswith("array") else splits  # as Megatron's experts do
        dist.all_to_all_single(floats(received), floats(6), [splits[rank]] * SIZE, given)
    elif name == "broadcast":
        dist.broadcast(floats(6), src=1)
    elif name == "reduce":
        dist.reduce(floats(6), dst=1)
    elif name == "gather":
        dist.gather(floats(6), [floats(6) for _ in range(SIZE)] if rank == 1 else None, dst=1)
    elif name == "scatter":
        dist.scatter(floats(6), [floats(6) for _ in range(SIZE)] if rank == 1 else None, src=1)
    elif name == "batch_isend_irecv":
        operations = [
            dist.P2POp(isend_by_name, floats(6), to),
            dist.P2POp(dist.irecv, floats(6), source),
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
    elif name == "send":
        if rank == 0:
            dist.send(floats(6), 1)
        elif rank == 1:
            dist.recv(floats(6), 0)
    else:
        dist.barrier()


def measure(rank: int, name: str) -> tuple[dict[str, tuple[int, int]], list[str]]:
    meter = TrafficMeter()
    with meter.running():
        operation(name, rank)
    operation("all_reduce", rank)  # after the meter stopped: not counted
    return {k: (t.calls, t.bytes) for k, t in meter.by_kind.items()}, list(meter.by_group)


# name, kind, bytes on ranks 0, 1, 2; 6 floats are 24 bytes
CASES = [
    ("all_reduce", "all_reduce", [32, 32, 32]),
    ("all_reduce, copied by name", "all_reduce", [32, 32, 32]),
    ("all_reduce, coalesced", "all_reduce", [32, 32, 32]),
    ("all_gather", "all_gather", [48, 48, 48]),
    ("all_gather_into_tensor", "all_gather", [48, 48, 48]),
    ("_all_gather_base", "all_gather", [48, 48, 48]),
    ("reduce_scatter", "reduce_scatter", [48, 48, 48]),
    ("reduce_scatter_tensor", "reduce_scatter", [48, 48, 48]),
    ("all_to_all_single", "all_to_all", [48, 48, 48]),
    ("all_to_all_single, uneven", "all_to_all", [20, 16, 12]),
    ("all_to_all_single, uneven, array", "all_to_all", [20, 16, 12]),
    ("broadcast", "broadcast", [16, 16, 16]),
    ("reduce", "reduce", [16, 16, 16]),
    ("gather", "gather", [24, 0, 24]),
    ("scatter", "scatter", [0, 48, 0]),
    ("batch_isend_irecv", "send", [24, 24, 24]),
]


@pytest.mark.parametrize(("name", "kind", "expected"), CASES, ids=[case[0] for case in CASES])
def test_bytes(pool: GlooPool, name: str, kind: str, expected: list[int]) -> None:
    results = pool.run(measure, name)
    assert [counts for counts, _ in results] == [{kind: (1, sent)} for sent in expected]
    assert all(groups == ["default_pg"] for _, groups in results)


def test_a_lone_send_counts_on_the_sender(pool: GlooPool) -> None:
    counts = [counts for counts, _ in pool.run(measure, "send")]
    assert counts == [{"send": (1, 24)}, {}, {}]


def test_a_barrier_carries_nothing(pool: GlooPool) -> None:
    assert [counts for counts, _ in pool.run(measure, "barrier")] == [{}, {}, {}]


def two_meters(rank: int) -> list[Any]:
    before = {name: getattr(dist.ProcessGroup, name) for name in METHODS}
    outer, inner = TrafficMeter(), TrafficMeter()
    outer.start()
    outer.start()
    operation("all_reduce", rank)
    with inner.running():
        operation("all_reduce", rank)
    operation("broadcast", rank)
    outer.stop()
    outer.stop()
    restored = all(getattr(dist.ProcessGroup, name) is f for name, f in before.items())
    counts = [outer.calls, inner.calls, outer.bytes, inner.bytes]
    outer.reset()
    return [*counts, outer.bytes, restored]


def test_meters_nest_and_leave_torch_as_it_was(pool: GlooPool) -> None:
    assert pool.run(two_meters) == [[3, 1, 80, 32, 0, True]] * SIZE


def failing(rank: int) -> tuple[str, int]:
    meter = TrafficMeter()
    with meter.running():
        try:
            dist.all_gather_into_tensor(floats(1), floats(6))
        except (ValueError, RuntimeError) as error:
            return type(error).__name__, meter.calls
    return "", meter.calls


def test_a_call_that_fails_is_not_counted(pool: GlooPool) -> None:
    for error, calls in pool.run(failing):
        assert error
        assert calls == 0
