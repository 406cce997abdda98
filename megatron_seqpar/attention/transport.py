# SPDX-License-Identifier: Apache-2.0
"""Transports: how the messages of one step reach their peers.

One call, `exchange`, posts all sends and receives of a step and returns at once; the handle's
`wait`
makes the receives usable. There are no tags: two ranks post their messages to each other in one
agreed order (`verify` proves it). Ranks here are always *group* ranks.

* `ProcessGroupTransport`: torch.distributed (NCCL, gloo), grouped point-to-point calls only. Lone
  sends on NCCL create a communicator for each pair of ranks when first used, and deadlock.
* `ThreadTransport`: ranks are threads of this process, for tests and for trying things out.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from ..errors import SeqParError
from .counters import Counters

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Message:
    """One tensor to or from a peer (group rank); contiguous. `kind` is for the counters."""

    peer: int
    tensor: torch.Tensor
    kind: str


class Pending(Protocol):
    """Transfers under way."""

    def wait(self) -> None:
        """Return when the receives may be used by work issued from now on (CUDA: stream order)."""


class Transport(Protocol):
    """What the executor needs of a group of ranks."""

    rank: int
    size: int
    counters: Counters

    def prepare(self, device: torch.device) -> None:
        """Called by every rank of the group before its first exchange."""

    def gather_lengths(self, local: int, device: torch.device) -> tuple[int, ...]:
        """The local token counts of all ranks, in rank order; every rank calls it, and waits."""

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        """Post all messages of one step without waiting."""


class _Nothing:
    def wait(self) -> None:
        """Nothing was posted."""


class _Works:
    """Works of one grouped call; holds the tensors until waited for."""

    def __init__(self, works: list[dist.Work], messages: tuple[Message, ...]) -> None:
        self.works, self.messages = works, messages

    def wait(self) -> None:
        for work in self.works:
            work.wait()
        self.messages = ()


class ProcessGroupTransport:
    """A torch.distributed process group (of this rank's SP axis)."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = group.rank(), group.size()
        self.counters = Counters()
        self._prepared = False

    def prepare(self, device: torch.device) -> None:
        # NCCL builds the group's communicator in its first collective, which all ranks must join;
        # in the steps that follow, ranks talk only to some peers.
        if not self._prepared and self.size > 1 and device.type == "cuda":
            dist.all_reduce(torch.zeros(1, device=device), group=self.group)
        self._prepared = True

    def gather_lengths(self, local: int, device: torch.device) -> tuple[int, ...]:
        own = torch.tensor([local], device=device)
        every = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(every, own, group=self.group)
        return tuple(int(length) for length in torch.cat(every).tolist())

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        if not sends and not receives:
            return _Nothing()
        operations = [
            dist.P2POp(dist.isend, m.tensor, group=self.group, group_peer=m.peer) for m in sends
        ]
        operations += [
            dist.P2POp(dist.irecv, m.tensor, group=self.group, group_peer=m.peer) for m in receives
        ]
        for m in sends:
            self.counters.sent(m.kind, m.tensor.nbytes)
        return _Works(dist.batch_isend_irecv(operations), (*sends, *receives))


class _Room:
    """Mailboxes shared by the threads of one group."""

    def __init__(self, size: int, timeout: float) -> None:
        self.timeout = timeout
        self.stopped = threading.Event()
        self.boxes: dict[tuple[int, int], queue.Queue[torch.Tensor]] = {
            (src, dst): queue.Queue() for src in range(size) for dst in range(size) if src != dst
        }

    def take(self, src: int, dst: int) -> torch.Tensor:
        for _ in range(max(1, int(self.timeout / 0.05))):
            try:
                return self.boxes[src, dst].get(timeout=0.05)
            except queue.Empty:
                if self.stopped.is_set():
                    break
        raise SeqParError(f"rank {dst} waits in vain for a message from rank {src}")


class _Letters:
    """Receives of one exchange; taken from the mailboxes when waited for."""

    def __init__(self, room: _Room, rank: int, receives: Sequence[Message]) -> None:
        self.room, self.rank, self.receives = room, rank, receives

    def wait(self) -> None:
        for m in self.receives:
            letter = self.room.take(m.peer, self.rank)
            if letter.shape != m.tensor.shape or letter.dtype != m.tensor.dtype:
                raise SeqParError(
                    f"rank {self.rank} expects {m.kind} {tuple(m.tensor.shape)} from {m.peer}, "
                    f"got {tuple(letter.shape)}"
                )
            m.tensor.copy_(letter)
        self.receives = ()


class ThreadTransport:
    """One rank of a group of threads; `ThreadTransport.run` starts such a group."""

    def __init__(self, room: _Room, rank: int, size: int) -> None:
        self._room, self.rank, self.size = room, rank, size
        self.counters = Counters()

    @staticmethod
    def run(size: int, work: Callable[[ThreadTransport], T], *, timeout: float = 60.0) -> list[T]:
        """Run `work(transport)` on `size` threads and return the results in rank order.

        The first exception of a rank is raised here; its peers stop waiting. `timeout`, in seconds,
        bounds each wait for a message.
        """
        room = _Room(size, timeout)
        results: list[Any] = [None] * size
        failures: list[tuple[int, BaseException]] = []

        def body(rank: int) -> None:
            try:
                results[rank] = work(ThreadTransport(room, rank, size))
            except BaseException as failure:  # handed to the caller below
                failures.append((rank, failure))
                room.stopped.set()

        threads = [threading.Thread(target=body, args=(rank,), daemon=True) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0][1]
        return results

    def prepare(self, device: torch.device) -> None:
        """Nothing to build."""

    def gather_lengths(self, local: int, device: torch.device) -> tuple[int, ...]:
        peers = [rank for rank in range(self.size) if rank != self.rank]
        for peer in peers:
            self._room.boxes[self.rank, peer].put(torch.tensor(local))
        lengths = {peer: int(self._room.take(peer, self.rank)) for peer in peers}
        lengths[self.rank] = local
        return tuple(lengths[rank] for rank in range(self.size))

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        for m in sends:
            # a copy, as on a wire: the sender may change its tensor afterwards
            self._room.boxes[self.rank, m.peer].put(m.tensor.clone())
            self.counters.sent(m.kind, m.tensor.nbytes)
        return _Letters(self._room, self.rank, receives)


class LocalTransport:
    """A group of one rank, where nothing is ever sent."""

    rank, size = 0, 1

    def __init__(self) -> None:
        self.counters = Counters()

    def prepare(self, device: torch.device) -> None:
        """Nothing to build."""

    def gather_lengths(self, local: int, device: torch.device) -> tuple[int, ...]:
        return (local,)

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        if sends or receives:
            raise SeqParError("a group of one rank has nobody to talk to")
        return _Nothing()


_TRANSPORTS: dict[str, ProcessGroupTransport] = {}


def transport_of(group: dist.ProcessGroup | Transport | None) -> Transport:
    """The transport of a group; None means the default process group, or one rank without any.

    A process group keeps its transport (so its communicator is prepared once).
    """
    if group is None:
        if not (dist.is_available() and dist.is_initialized()):
            return LocalTransport()
        group = dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):
        assert group is not None
        return group
    known = _TRANSPORTS.get(group.group_name)
    if known is None or known.group is not group:  # names are used again after a destroy
        known = _TRANSPORTS[group.group_name] = ProcessGroupTransport(group)
    return known
