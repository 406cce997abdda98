# SPDX-License-Identifier: Apache-2.0
"""Stream bookkeeping of the thread transport, on a device whose streams are played on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from benchmarks.gpu.stress import Fault, StressedTransport
from megatron_seqpar.attention import ThreadTransport
from megatron_seqpar.attention.transport import Message
from tests.support.streams import DEVICE, Device, Tensor

SIZE, STEPS = 4, 6


class _Poisoned(StressedTransport):
    """The stressed transport, but for taking freed memory, which a played device has none of."""

    def posting(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        for m in receives:
            m.tensor.fill_(float("nan"))


def _wrong(group: type[ThreadTransport], seed: int) -> int:
    """As `stress.passing_around`, on played streams: how many numbers came wrong."""
    device = Device()
    numbers: list[list[list[float]]] = [[] for _ in range(SIZE)]

    def work(transport: ThreadTransport) -> None:
        outgoing, incoming = (Tensor(device) for _ in range(2))
        for step in range(STEPS):
            shift = 1 + step % (SIZE - 1)
            to, by = (transport.rank + shift) % SIZE, (transport.rank - shift) % SIZE
            outgoing.fill_(10.0 * step + transport.rank)
            messages: Any = [Message(to, outgoing, "x")], [Message(by, incoming, "x")]  # type: ignore[arg-type]
            transport.exchange(*messages).wait()
            read: list[float] = []
            incoming.read(read)
            numbers[transport.rank].append(read)

    with device.patched():
        group.run(SIZE, work, device=DEVICE)
        device.finish(seed)
    expected = [
        [[10.0 * step + (rank - 1 - step % (SIZE - 1)) % SIZE] for step in range(STEPS)]
        for rank in range(SIZE)
    ]
    return sum(
        got != right
        for mine, theirs in zip(numbers, expected, strict=True)
        for got, right in zip(mine, theirs, strict=True)
    )


@pytest.mark.parametrize("group", [ThreadTransport, _Poisoned])
def test_every_order_that_the_events_allow_is_right(group: type[ThreadTransport]) -> None:
    assert [_wrong(group, seed) for seed in range(60)] == [0] * 60


@pytest.mark.parametrize("fault", Fault)
def test_each_rule_is_needed(fault: Fault) -> None:
    group = type("Faulty", (_Poisoned,), {"fault": fault})
    assert any(_wrong(group, seed) for seed in range(60))


@pytest.mark.parametrize("seed", range(10))
def test_ranks_have_streams_of_their_own_and_the_caller_follows_them(seed: int) -> None:
    device = Device()
    result: list[float] = []

    def work(transport: ThreadTransport) -> Tensor:
        assert device.current() is not device.default
        tensor = Tensor(device)
        tensor.fill_(1.0 + transport.rank)
        return tensor

    with device.patched():
        before = Tensor(device)
        before.fill_(5.0)  # on the caller's stream: the ranks come after it
        tensors = ThreadTransport.run(SIZE, work, device=DEVICE)
        for tensor in tensors:
            tensor.read(result)
        device.finish(seed)
    assert result == [1.0, 2.0, 3.0, 4.0]
    assert len(device.streams) == 1 + SIZE


def test_both_ends_are_known_to_the_transfer_stream() -> None:
    """A rank that fails does not wait, and its memory must not go back before the copy."""
    device = Device()
    tensors = [Tensor(device) for _ in range(2)]

    def work(transport: ThreadTransport) -> None:
        mine: Any = tensors[transport.rank]
        sends, receives = [Message(1, mine, "x")], [Message(0, mine, "x")]
        transport.exchange(*((sends, []) if transport.rank == 0 else ([], receives))).wait()

    with device.patched():
        ThreadTransport.run(2, work, device=DEVICE)
    assert [len(tensor.recorded) for tensor in tensors] == [1, 1]
    assert tensors[0].recorded == tensors[1].recorded
