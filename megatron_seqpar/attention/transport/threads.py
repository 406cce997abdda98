# SPDX-License-Identifier: Apache-2.0
"""Ranks that are threads of one process: any number of them, on the CPU or on one GPU.

On a GPU every rank can have a compute stream of its own, and has a transfer stream for what it
receives; copies between ranks run beside the computing, as they do between GPUs. So the stream
bookkeeping of an executor can be checked on one GPU (`benchmarks/gpu/streams.py` does).

Note: autograd and threads
--------------------------
Autograd runs the backward pass of all CUDA tensors of one device in one thread of its own. Ranks
that wait for one another inside their backward passes would wait there forever, one behind the
other, so `run` makes each rank's backward pass stay in that rank's thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import torch

from ..counters import Counters
from .base import Message, Nothing, Pending
from .rendezvous import End, Rendezvous, disagreement

T = TypeVar("T")
Ranks = TypeVar("Ranks", bound="ThreadTransport")


class ThreadTransport:
    """See `Transport`: one rank of a group of threads; `ThreadTransport.run` starts such a group.

    Subclasses may step in where streams are ordered: `posting`, `transfer_stream`, `copy`,
    `settle`.
    """

    def __init__(self, rendezvous: Rendezvous, rank: int, size: int) -> None:
        self.rendezvous, self.rank, self.size = rendezvous, rank, size
        self.counters = Counters()

    @classmethod
    def run(
        cls: type[Ranks],
        size: int,
        work: Callable[[Ranks], T],
        *,
        timeout: float = 60.0,
        device: torch.device | None = None,
    ) -> list[T]:
        """Run `work(transport)` on `size` threads and return the results in rank order.

        The first exception of a rank is raised here; its peers stop waiting. `timeout`, in seconds,
        bounds each wait for a message. With a CUDA `device` every rank works on a stream of its
        own, behind what the calling thread's stream has been given, and that stream then follows
        them all; without one all ranks share the streams that are current in new threads.
        """
        rendezvous = Rendezvous(timeout)
        results: list[Any] = [None] * size
        failures: list[BaseException] = []
        streams = _own_streams(size, device)

        def body(rank: int) -> None:
            try:
                stream = streams[rank]
                own_stream = nullcontext() if stream is None else torch.cuda.stream(stream)
                with torch.autograd.set_multithreading_enabled(False), own_stream:
                    results[rank] = work(cls(rendezvous, rank, size))
            except BaseException as failure:  # handed to the caller below
                failures.append(failure)
                rendezvous.stopped.set()

        threads = [threading.Thread(target=body, args=(rank,), daemon=True) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        for stream, result in zip(streams, results, strict=True):
            if stream is not None:
                caller = torch.cuda.current_stream(stream.device)
                caller.wait_stream(stream)
                for tensor in _tensors(result):
                    tensor.record_stream(caller)  # else its memory goes back behind `stream` only
        return results

    def prepare(self, device: torch.device) -> None:
        """Nothing to build."""

    def gather_lengths(self, local: int, device: torch.device) -> tuple[int, ...]:
        lengths = torch.zeros(self.size, dtype=torch.int64)
        lengths[self.rank] = local
        peers = [rank for rank in range(self.size) if rank != self.rank]
        own = lengths[self.rank : self.rank + 1]
        ends = [self._post(Message(peer, own, "length"), True) for peer in peers]
        ends += [self._post(Message(p, lengths[p : p + 1], "length"), False) for p in peers]
        for end in ends:
            self.rendezvous.wait(end)
        return tuple(lengths.tolist())

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        if not sends and not receives:
            return Nothing()
        for m in sends:
            self.counters.sent(m.kind, m.tensor.nbytes)
        self.posting(sends, receives)
        device = (*sends, *receives)[0].tensor.device
        posted = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
        ends = [self._post(m, True, posted) for m in sends]
        ends += [self._post(m, False, posted) for m in receives]
        return _Ends(self, ends)

    def posting(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        """Called on the compute stream before messages are posted."""

    def transfer_stream(self, receiver: int, device: torch.device) -> torch.cuda.Stream:
        """Where copies to that rank are made; called by whichever rank posts its end second."""
        return self.rendezvous.transfer_stream(receiver, device)

    def copy(self, send: End, receive: End, stream: torch.cuda.Stream | None) -> None:
        """Copy one message; `stream` is the transfer stream, current here, or None on the CPU."""
        if stream is not None:
            assert send.posted is not None
            assert receive.posted is not None
            stream.wait_event(send.posted)
            stream.wait_event(receive.posted)
        receive.tensor.copy_(send.tensor, non_blocking=True)

    def settle(self, end: End) -> None:
        """Wait for one posted end: called for each when an exchange is waited for."""
        self.rendezvous.wait(end)
        if end.copied is not None:
            torch.cuda.current_stream(end.tensor.device).wait_event(end.copied)

    def _post(self, m: Message, sending: bool, posted: torch.cuda.Event | None = None) -> End:
        end = End(sending, self.rank, m.peer, m.tensor, m.kind, posted)
        other = self.rendezvous.meet(end)
        if other is not None:
            self._join(*((end, other) if sending else (other, end)))
        return end

    def _join(self, send: End, receive: End) -> None:
        failure = disagreement(send, receive)
        if failure is None:
            device = receive.tensor.device
            if device.type == "cuda":
                stream = self.transfer_stream(receive.rank, device)
                with torch.cuda.stream(stream):
                    self.copy(send, receive, stream)
                send.copied = receive.copied = stream.record_event()
                # both ends hold their tensors until they wait; a rank that fails does not wait
                send.tensor.record_stream(stream)
                receive.tensor.record_stream(stream)
            else:
                self.copy(send, receive, None)
        for end in (send, receive):
            end.failure = failure
            end.done.set()


class _Ends:
    """Posted ends of one exchange; holds the tensors until waited for."""

    def __init__(self, transport: ThreadTransport, ends: list[End]) -> None:
        self.transport, self.ends = transport, ends

    def wait(self) -> None:
        for end in self.ends:
            self.transport.settle(end)
        self.ends = []


def _own_streams(size: int, device: torch.device | None) -> Sequence[torch.cuda.Stream | None]:
    """A new stream a rank, behind the calling thread's; None a rank without a CUDA device."""
    if device is None or device.type != "cuda":
        return [None] * size
    streams = [torch.cuda.Stream(device) for _ in range(size)]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream(device))
    return streams


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
