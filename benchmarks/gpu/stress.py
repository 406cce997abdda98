# SPDX-License-Identifier: Apache-2.0
"""A transport of threads that makes races show: delays at random, and poison in free memory.

* Before every post and every copy a stream (on the CPU: a thread) sleeps for a random time, so
  that work that is not ordered is soon seen out of order.
* Tensors to receive in are filled with NaN when posted: who reads too early reads NaN.
* Memory that was freed is taken again and filled with NaN: who let go too early sends NaN.

`Fault` leaves one rule of the bookkeeping out, to prove that the checks would notice.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from enum import StrEnum
from typing import ClassVar

import torch

from megatron_seqpar.attention import ThreadTransport
from megatron_seqpar.attention.transport import Message
from megatron_seqpar.attention.transport.rendezvous import End, Rendezvous

NAN = float("nan")
CYCLES_PER_SECOND = 1.9e9  # what torch.cuda._sleep counts, about, on the GPUs of these years
SIZES_TO_POISON = 8


class Fault(StrEnum):
    """A rule of `transport.base` to leave out."""

    SEND_NOT_READY = "the copy does not wait for the sender's data"
    RECEIVE_NOT_FREE = "the copy does not wait for the receiver's buffer"
    RECEIVE_NOT_AWAITED = "the receiver does not wait for the copy"
    SEND_NOT_AWAITED = "the sender does not wait for the copy"


FAULTS_WITHOUT_STREAMS = (Fault.RECEIVE_NOT_AWAITED, Fault.SEND_NOT_AWAITED)
"""Those that exist on the CPU, where a copy is made at once when both ends are posted."""


class StressedTransport(ThreadTransport):
    """See the text at the top; made by `stressed`."""

    seed: ClassVar[int] = 0
    longest: ClassVar[float] = 0.0
    fault: ClassVar[Fault | None] = None

    def __init__(self, rendezvous: Rendezvous, rank: int, size: int) -> None:
        super().__init__(rendezvous, rank, size)
        self._random = random.Random(f"{self.seed}:{rank}")
        self._sizes: dict[int, None] = {}  # of freed memory, the latest last

    def posting(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        device = (*sends, *receives)[0].tensor.device
        self._pause(device)
        for m in receives:
            m.tensor.fill_(NAN)
        for size in list(self._sizes):
            torch.empty(size, dtype=torch.uint8, device=device).fill_(0xFF)  # a NaN in any dtype
        for m in (*sends, *receives):
            self._sizes[m.tensor.nbytes] = self._sizes.pop(m.tensor.nbytes, None)
        for old in list(self._sizes)[:-SIZES_TO_POISON]:
            del self._sizes[old]

    def copy(self, send: End, receive: End, stream: torch.cuda.Stream | None) -> None:
        device = receive.tensor.device
        if stream is None or self.fault not in (Fault.SEND_NOT_READY, Fault.RECEIVE_NOT_FREE):
            self._pause(device)
            super().copy(send, receive, stream)
            return
        kept = send.posted if self.fault is Fault.RECEIVE_NOT_FREE else receive.posted
        assert kept is not None
        stream.wait_event(kept)
        receive.tensor.copy_(send.tensor, non_blocking=True)

    def settle(self, end: End) -> None:
        left_out = Fault.SEND_NOT_AWAITED if end.sending else Fault.RECEIVE_NOT_AWAITED
        if self.fault is not left_out:
            super().settle(end)
        elif end.tensor.device.type == "cuda":
            self.rendezvous.wait(end)  # the host waits for the other post, the stream for nothing

    def _pause(self, device: torch.device) -> None:
        """Let the current stream, or this thread, sleep: half the time not at all."""
        seconds = self._random.choice((0.0, self._random.uniform(0.0, self.longest)))
        if device.type == "cuda":
            torch.cuda._sleep(int(seconds * CYCLES_PER_SECOND))
        elif seconds:
            time.sleep(seconds)


def stressed(
    seed: int, longest: float = 3e-4, fault: Fault | None = None
) -> type[StressedTransport]:
    """A transport class with random sleeps of up to `longest` seconds and perhaps a fault."""
    values = {"seed": seed, "longest": longest, "fault": fault}
    return type("StressedTransport", (StressedTransport,), values)


def passing_around(transport: ThreadTransport, device: torch.device, steps: int, count: int) -> int:
    """Every rank sends to one and receives from another, over and over; numbers that came wrong.

    Both buffers, of `count` numbers, are written again as soon as they were waited for, so every
    rule on streams is needed for every number to be right. Wrong numbers are counted on the device,
    and nothing waits for it until the end.
    """
    outgoing, incoming = torch.empty(count, device=device), torch.empty(count, device=device)
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    for step in range(steps):
        shift = 1 + step % (transport.size - 1)
        to, by = (
            (transport.rank + shift) % transport.size,
            (transport.rank - shift) % transport.size,
        )
        outgoing.fill_(_number(step, transport.rank))
        pending = transport.exchange(
            [Message(to, outgoing, "number")], [Message(by, incoming, "number")]
        )
        pending.wait()
        wrong += (incoming != _number(step, by)).sum()
    return int(wrong)


def _number(step: int, sender: int) -> float:
    return float(step * 64 + sender)
