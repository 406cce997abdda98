# SPDX-License-Identifier: Apache-2.0
"""Transports by themselves: what arrives, when, and that the checks of it can fail."""

from __future__ import annotations

import threading
import time

import pytest
import torch
import torch.distributed as dist

from benchmarks.gpu.stress import FAULTS_WITHOUT_STREAMS, Fault, passing_around, stressed
from megatron_seqpar.attention import LocalTransport, ProcessGroupTransport, ThreadTransport
from megatron_seqpar.attention.transport import Message
from megatron_seqpar.errors import SeqParError
from tests.support.pool import GlooPool

CPU = torch.device("cpu")


def test_messages_of_a_pair_arrive_in_order_whoever_posts_first() -> None:
    def work(transport: ThreadTransport) -> list[float]:
        other = 1 - transport.rank
        if transport.rank:
            time.sleep(0.05)
        sends = [Message(other, torch.full((3,), 10.0 * transport.rank + i), "x") for i in range(3)]
        receives = [Message(other, torch.empty(3), "x") for _ in range(3)]
        transport.exchange(sends, receives).wait()
        return [m.tensor.unique().item() for m in receives]

    assert ThreadTransport.run(2, work) == [[10, 11, 12], [0, 1, 2]]


def test_data_arrives_while_the_receiver_computes() -> None:
    sent = threading.Event()

    def work(transport: ThreadTransport) -> bool:
        other = 1 - transport.rank
        if transport.rank == 0:
            buffer = torch.zeros(4)
            pending = transport.exchange([], [Message(other, buffer, "x")])
            assert sent.wait(10)
            arrived = bool((buffer == 7).all())  # nobody has waited yet
            pending.wait()
            return arrived
        transport.exchange([Message(other, torch.full((4,), 7.0), "x")], []).wait()
        sent.set()
        return True

    assert ThreadTransport.run(2, work) == [True, True]


def test_a_sender_waits_until_its_buffer_is_free() -> None:
    def work(transport: ThreadTransport) -> float:
        if transport.rank == 0:
            transport.exchange([Message(1, torch.ones(2), "x")], []).wait()
            return time.perf_counter()
        time.sleep(0.2)
        posted = time.perf_counter()
        transport.exchange([], [Message(0, torch.empty(2), "x")]).wait()
        return posted

    freed, posted = ThreadTransport.run(2, work)
    assert freed >= posted


def test_what_is_counted() -> None:
    def work(transport: ThreadTransport) -> dict[str, object]:
        assert transport.gather_lengths(3 + transport.rank, CPU) == (3, 4, 5)
        to, by = (transport.rank + 1) % 3, (transport.rank - 1) % 3
        transport.exchange([], []).wait()
        transport.exchange(
            [Message(to, torch.ones(5, dtype=torch.bfloat16), "kv")],
            [Message(by, torch.empty(5, dtype=torch.bfloat16), "kv")],
        ).wait()
        return transport.counters.as_dict()

    for counted in ThreadTransport.run(3, work):
        assert counted == {
            "messages": 1, "bytes": 10, "bytes_by_kind": {"kv": 10}, "forward_calls": 0,
            "backward_calls": 0,
        }  # fmt: skip


@pytest.mark.parametrize(
    ("received", "says"),
    [
        (torch.empty(3), r"expects q \(3,\) torch.float32 from rank 0, which sends q \(2,\)"),
        (torch.empty(2, dtype=torch.float64), r"expects q \(2,\) torch.float64 from rank 0"),
    ],
)
def test_ends_that_do_not_fit(received: torch.Tensor, says: str) -> None:
    def work(transport: ThreadTransport) -> None:
        ours = Message(1 - transport.rank, received if transport.rank else torch.ones(2), "q")
        sends, receives = ([], [ours]) if transport.rank else ([ours], [])
        transport.exchange(sends, receives).wait()

    with pytest.raises(SeqParError, match=says):
        ThreadTransport.run(2, work)


def test_waiting_in_vain_is_bounded_and_named() -> None:
    def silent(transport: ThreadTransport) -> None:
        if transport.rank == 0:
            transport.exchange([], [Message(1, torch.empty(2), "kv")]).wait()

    with pytest.raises(
        SeqParError, match="rank 0 waits in vain for rank 1 to post its end of a kv"
    ):
        ThreadTransport.run(2, silent, timeout=0.2)

    def failing(transport: ThreadTransport) -> None:
        if transport.rank == 1:
            raise ValueError("rank 1 is out of memory")
        silent(transport)

    start = time.perf_counter()
    with pytest.raises(ValueError, match="rank 1 is out of memory"):
        ThreadTransport.run(2, failing, timeout=60)
    assert time.perf_counter() - start < 10


def test_a_group_of_one_has_nobody_to_talk_to() -> None:
    transport = LocalTransport()
    assert transport.gather_lengths(5, CPU) == (5,)
    transport.exchange([], []).wait()
    with pytest.raises(SeqParError, match="nobody to talk to"):
        transport.exchange([Message(0, torch.ones(1), "kv")], [])


def test_backward_passes_stay_in_the_threads_of_their_ranks() -> None:
    def work(transport: ThreadTransport) -> bool:
        return torch._C._is_multithreading_enabled()

    assert ThreadTransport.run(2, work) == [False, False]
    assert torch._C._is_multithreading_enabled()


# ---- under stress ---------------------------------------------------------------------------


def _wrong(device: torch.device, seed: int, fault: Fault | None = None) -> int:
    count = 1 << (18 if device.type == "cuda" else 8)
    group = stressed(seed, 1e-3, fault)
    return sum(group.run(4, lambda t: passing_around(t, device, 20, count), device=device))


def test_under_stress_every_number_is_right() -> None:
    assert [_wrong(CPU, seed) for seed in range(3)] == [0, 0, 0]


@pytest.mark.parametrize("fault", FAULTS_WITHOUT_STREAMS)
def test_stress_finds_faults(fault: Fault) -> None:
    assert any(_wrong(CPU, seed, fault) for seed in range(5))


@pytest.mark.needs_gpu
def test_under_stress_every_number_is_right_on_streams() -> None:
    assert [_wrong(torch.device("cuda"), seed) for seed in range(5)] == [0] * 5


@pytest.mark.needs_gpu
@pytest.mark.parametrize("fault", Fault)
def test_stress_finds_faults_on_streams(fault: Fault) -> None:
    assert any(_wrong(torch.device("cuda"), seed, fault) for seed in range(5))


@pytest.mark.needs_gpu
def test_results_can_be_used_on_the_stream_of_the_caller() -> None:
    def work(transport: ThreadTransport) -> list[torch.Tensor]:
        torch.cuda._sleep(10_000_000)
        return [torch.full((1 << 20,), float(transport.rank), device="cuda")]

    parts = ThreadTransport.run(4, work, device=torch.device("cuda"))
    total = sum(part.sum() for (part,) in parts)
    assert int(total) == 6 << 20


# ---- process groups -------------------------------------------------------------------------


def _around(rank: int, host_only: bool) -> tuple[list[float], int]:
    """Pass numbers around the world of six; `host_only` as for CUDA tensors over gloo."""
    assert dist.group.WORLD is not None
    transport = ProcessGroupTransport(dist.group.WORLD)
    assert transport.moves_host_memory_only
    transport.prepare(CPU)
    to, by = (rank + 1) % 6, (rank - 1) % 6
    send, receive = torch.full((4,), float(rank)), torch.empty(4)
    post = transport._through_host if host_only else transport.exchange
    pending = post([Message(to, send, "kv")], [Message(by, receive, "kv")])
    del send
    pending.wait()
    pending.wait()
    return receive.tolist(), transport.counters.bytes


@pytest.mark.parametrize("host_only", [False, True])
def test_gloo(six_ranks: GlooPool, host_only: bool) -> None:
    results = six_ranks.run(_around, host_only)
    assert [numbers for numbers, _ in results] == [[(rank - 1) % 6] * 4 for rank in range(6)]
    assert {sent for _, sent in results} == {0 if host_only else 16}
