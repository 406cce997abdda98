# SPDX-License-Identifier: Apache-2.0
"""What layers keep for backward, moved to host memory and brought back ahead of its use.

A `Parcel` holds what one run of one layer keeps. `put` starts a tensor's copy to the host as soon
as it is made; `close` says that the layer is done; `get`, in backward, gives the tensor back, and
the first `get` of a parcel starts bringing back the one that backward wants next: the newest that
has not been asked for (backward goes last in, first out) of the same group, a micro-batch.

Copies run in lanes beside the one that computes, one out and one in. Nothing makes the CPU wait:

- The out lane reads a tensor once all that computes up to `put` is done. The tensor stays
  referenced until the compute lane has been made to wait for that copy, so the allocator gives its
  memory to nobody before. That happens `behind` closed parcels later, when the copy has long been
  made, and bounds what waits to leave however far the CPU runs ahead.
- The in lane writes new memory once all that computed up to then is done, which may have been using
  it, and the compute lane waits for the copy in `get`.
- A host buffer is reused when the copy that last read it is done, in the lane that writes it.

So at any time the device holds, beside the layers at work, at most `behind` parcels that are on
their way out and `ahead` on their way in. A parcel still on its way out when backward asks for it
never left: it is given back as it is.
"""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import ref

import torch

COMPUTE, OUT, IN = "compute", "out", "in"
_ROUND = 4096  # bytes; pages


class Lanes(Protocol):
    """Three queues of a device's work: `COMPUTE` is whatever runs now, `OUT` and `IN` copy."""

    def mark(self, lane: str) -> Any:
        """An event: all that is in the lane's queue by now is done."""

    def wait(self, lane: str, event: Any) -> None:
        """What comes into the lane's queue from now on is done after the event."""

    def copy(self, lane: str, into: torch.Tensor, source: torch.Tensor) -> None:
        """Queue a copy between the device and a host buffer; both flat, of one dtype and size."""

    def host_buffer(self, nbytes: int) -> torch.Tensor:
        """New host memory, uint8 `[nbytes]`, that copies need not stop for."""


class CudaLanes:
    """Streams of one GPU, and pinned host memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = {lane: torch.cuda.Stream(device) for lane in (OUT, IN)}

    def _stream(self, lane: str) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._device) if lane == COMPUTE else self._side[lane]

    def mark(self, lane: str) -> torch.cuda.Event:
        return self._stream(lane).record_event()

    def wait(self, lane: str, event: torch.cuda.Event) -> None:
        self._stream(lane).wait_event(event)

    def copy(self, lane: str, into: torch.Tensor, source: torch.Tensor) -> None:
        with torch.cuda.stream(self._side[lane]):
            into.copy_(source, non_blocking=True)

    def host_buffer(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


@dataclass(eq=False)
class Buffer:
    """Host memory, and the event after which it may be written; None: at once."""

    memory: torch.Tensor
    free: Any = None

    @property
    def nbytes(self) -> int:
        return self.memory.numel()


class HostPool:
    """Host buffers that are used again.

    Holds no more than the most that was in use at once: what fits nothing any more goes.

    Attributes:
        allocations: buffers made since the start.
        in_use, idle: bytes.
    """

    def __init__(self, allocate: Callable[[int], torch.Tensor]) -> None:
        self._allocate = allocate
        self._free: list[Buffer] = []  # the longest idle first
        self.allocations = self.in_use = self.idle = self._most = 0

    def take(self, nbytes: int) -> Buffer:
        """A buffer of at least `nbytes`, and less than twice that unless new."""
        fitting = [each for each in self._free if nbytes <= each.nbytes < 2 * max(nbytes, _ROUND)]
        if fitting:
            buffer = min(reversed(fitting), key=lambda each: each.nbytes)
            self._free = [each for each in self._free if each is not buffer]
            self.idle -= buffer.nbytes
        else:
            buffer = Buffer(self._allocate(-(-nbytes // _ROUND) * _ROUND))
            self.allocations += 1
        self.in_use += buffer.nbytes
        self._most = max(self._most, self.in_use)
        while self._free and self.in_use + self.idle > self._most:
            self.idle -= self._free.pop(0).nbytes
        return buffer

    def give(self, buffer: Buffer, free: Any) -> None:
        """Return a buffer; `free`: the event of the last copy from or to it."""
        buffer.free = free
        self.in_use -= buffer.nbytes
        self.idle += buffer.nbytes
        self._free.append(buffer)


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether the tensor's elements fill one range of memory, in whatever order of its dims."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return tensor.numel() > 0


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """A dense tensor's elements as they lie in memory, `[numel]`."""
    return tensor.as_strided((tensor.numel(),), (1,))


class _Item:
    """One tensor of a parcel: on the device, in a host buffer, or both.

    on_device: None once the tensor is only in the host buffer.
    buffer: None for a tensor that stays where it is.
    copied: event of the last copy, out or in.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self.on_device: torch.Tensor | None = tensor
        self.shape, self.stride = tensor.shape, tensor.stride()
        self.dtype, self.device = tensor.dtype, tensor.device
        self.nbytes = tensor.numel() * tensor.element_size()
        self.buffer: Buffer | None = None
        self.copied: Any = None

    def in_host(self) -> torch.Tensor:
        """The part of the buffer that is the tensor's, flat."""
        assert self.buffer is not None
        return self.buffer.memory[: self.nbytes].view(self.dtype)


class Parcel:
    """What one run of a layer keeps; made by `Stash.parcel`."""

    def __init__(self, stash: Stash, serial: int, group: int) -> None:
        self.serial, self.group = serial, group
        self.asked = self.fetched = False
        self._stash = stash
        self._items: list[_Item | None] = []

    def put(self, tensor: torch.Tensor) -> int:
        """Keep a tensor, all computed by now; returns its number.

        The tensor must not be written to afterwards. One whose elements do not fill a range of
        memory, or that is not on the stash's device, stays where it is.
        """
        # An alias: Megatron empties tensors it has sent to the next stage, but only its own.
        item = _Item(tensor.detach())
        self._items.append(item)
        if tensor.device == self._stash.device and is_dense(tensor):
            self._stash._send(item)
        return len(self._items) - 1

    def close(self) -> None:
        """The layer is done; a parcel closed `behind` parcels before this one leaves the device."""
        self._stash._closed(self)

    def get(self, number: int) -> torch.Tensor:
        """The tensor, with its own shape and strides. Once for each, in any order.

        Raises `RuntimeError` for a tensor that was given back before.
        """
        item = self._items[number]
        if item is None:
            raise RuntimeError("what a layer kept is given back once; backward ran a second time")
        self._stash._asked(self)
        self._items[number] = None
        return self._stash._receive(item)

    def _live(self) -> list[_Item]:
        return [item for item in self._items if item is not None]

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self._stash._forgotten(self)


class Stash:
    """The parcels of one device. See the module for what is bounded and who waits for whom.

    device: where the tensors are.
    lanes: its queues.
    behind: closed parcels that may still be on the device, at least 1.
    ahead: parcels brought back before anybody asked for them.

    Attributes:
        pool: the host buffers.
        bytes_out, bytes_in: copied since the start.
    """

    def __init__(
        self, device: torch.device, lanes: Lanes, *, behind: int = 1, ahead: int = 1
    ) -> None:
        self.device, self._lanes = device, lanes
        self.pool = HostPool(lanes.host_buffer)
        self.bytes_out = self.bytes_in = 0
        self._behind, self._ahead = behind, ahead
        self._serial = self._group = 0
        self._waiting: list[tuple[int, ref[Parcel]]] = []  # not asked for, in order
        self._leaving: deque[Parcel] = deque()
        self._guessed: set[int] = set()  # fetched and not asked for

    def begin_group(self) -> None:
        """Parcels from now on are of another micro-batch."""
        self._group += 1

    def parcel(self) -> Parcel:
        """A new, empty parcel: a layer begins."""
        self._serial += 1
        parcel = Parcel(self, self._serial, self._group)
        self._waiting.append((self._serial, ref(parcel)))
        return parcel

    def _send(self, item: _Item) -> None:
        """Start the copy to the host."""
        assert item.on_device is not None
        item.buffer = self.pool.take(item.nbytes)
        if item.buffer.free is not None:
            self._lanes.wait(OUT, item.buffer.free)
        self._lanes.wait(OUT, self._lanes.mark(COMPUTE))
        self._lanes.copy(OUT, item.in_host(), _flat(item.on_device))
        item.copied = self._lanes.mark(OUT)
        self.bytes_out += item.nbytes

    def _closed(self, parcel: Parcel) -> None:
        """Let go of what was closed `behind` parcels ago."""
        self._leaving.append(parcel)
        while len(self._leaving) > self._behind:
            for item in self._leaving.popleft()._live():
                if item.buffer is not None:
                    self._lanes.wait(COMPUTE, item.copied)
                    item.on_device = None

    def _asked(self, parcel: Parcel) -> None:
        """Backward has come to a parcel: see that it is here or coming, and the next one too."""
        if parcel.asked:
            return
        parcel.asked = True
        self._guessed.discard(parcel.serial)
        self._leaving = deque(each for each in self._leaving if each is not parcel)
        self._fetch(parcel)
        place = self._drop_from_waiting(parcel)
        if place and len(self._guessed) < self._ahead:
            guess = self._waiting[place - 1][1]()
            # one that is still leaving is here already
            if guess is not None and guess.group == parcel.group and guess not in self._leaving:
                self._guessed.add(guess.serial)
                self._fetch(guess)

    def _drop_from_waiting(self, parcel: Parcel) -> int:
        """Returns how many older parcels wait."""
        place = bisect_left(self._waiting, parcel.serial, key=lambda each: each[0])
        if place < len(self._waiting) and self._waiting[place][0] == parcel.serial:
            del self._waiting[place]
        return place

    def _fetch(self, parcel: Parcel) -> None:
        """Start the copies from the host, of what is nowhere else."""
        if parcel.fetched:
            return
        parcel.fetched = True
        away = [item for item in parcel._live() if item.on_device is None]
        if not away:
            return
        for item in away:
            item.on_device = torch.empty_strided(
                item.shape, item.stride, dtype=item.dtype, device=item.device
            )
        self._lanes.wait(IN, self._lanes.mark(COMPUTE))
        for item in away:
            assert item.on_device is not None
            self._lanes.wait(IN, item.copied)
            self._lanes.copy(IN, _flat(item.on_device), item.in_host())
            item.copied = self._lanes.mark(IN)
            self.bytes_in += item.nbytes

    def _receive(self, item: _Item) -> torch.Tensor:
        """The tensor, to be used by what computes from now on; its buffer goes to the pool."""
        assert item.on_device is not None
        if item.buffer is not None:
            self._lanes.wait(COMPUTE, item.copied)
            self.pool.give(item.buffer, item.copied)
            item.buffer = None
        return item.on_device

    def _forgotten(self, parcel: Parcel) -> None:
        """A parcel is dropped with tensors that nobody asked for."""
        self._drop_from_waiting(parcel)
        self._guessed.discard(parcel.serial)
        for item in parcel._live():
            if item.on_device is not None:
                self._receive(item)  # its memory is free when the copy is done
            elif item.buffer is not None:
                self.pool.give(item.buffer, item.copied)
