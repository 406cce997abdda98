# SPDX-License-Identifier: Apache-2.0
"""What layers keep goes to the host and comes back: whole, in time, and never all at once.

A played device queues what computes and what copies and does it later, one lane after another in
any order that the events allow. Memory that is given back to the allocator is written over by the
lane that computes, as a GPU's next kernel would, so a copy that is not waited for shows.
"""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from megatron_seqpar.memory.offload import COMPUTE, IN, OUT, CudaLanes, HostPool, Stash, is_dense
from tests.support.streams import Device

CPU = torch.device("cpu")
LAYERS, SIZE = 4, 6


class PlayedLanes:
    """Lanes of a played device over real memory. `deaf`: lanes that wait for nobody."""

    def __init__(self, deaf: str = "") -> None:
        self.device = Device()
        self.queues = {
            COMPUTE: self.device.default,
            OUT: self.device.new_stream(),
            IN: self.device.new_stream(),
        }
        self.deaf = deaf

    def mark(self, lane):
        return self.queues[lane].record_event()

    def wait(self, lane, event):
        if lane != self.deaf:
            self.queues[lane].wait_event(event)

    def copy(self, lane, into, source):
        self.queues[lane].do(lambda: into.copy_(source))

    def host_buffer(self, nbytes):
        return torch.full((nbytes,), 255, dtype=torch.uint8)

    def compute(self, what):
        self.queues[COMPUTE].do(what)

    def spoil(self, tensor):
        """Work on memory that was the tensor's, or is to become it."""
        raw = tensor.detach().as_strided((tensor.numel(),), (1,))
        self.compute(lambda: raw.fill_(-1.0))

    def spoil_when_freed(self, tensor):
        raw = tensor.detach().as_strided((tensor.numel(),), (1,))
        weakref.finalize(tensor, lambda: self.compute(lambda: raw.fill_(-1.0)))


class Run:
    """Layers that keep two tensors each; notes what backward saw and what the device held."""

    def __init__(self, lanes, monkeypatch, **bounds) -> None:
        self.lanes, self.stash = lanes, Stash(CPU, lanes, **bounds)
        self.kept: dict[tuple[int, int], list] = {}
        self.seen: dict[tuple[int, int], list[torch.Tensor]] = {}
        self.most = 0
        plain = torch.empty_strided

        def recycled(*args, **kwargs):
            tensor = plain(*args, **kwargs)
            lanes.spoil(tensor)  # whoever had this memory may still be at work
            lanes.spoil_when_freed(tensor)
            return tensor

        monkeypatch.setattr(torch, "empty_strided", recycled)

    def value(self, batch, layer, which):
        return float(100 * batch + 10 * layer + which)

    def forward(self, batch):
        self.stash.begin_group()
        for layer in range(LAYERS):
            parcel = self.stash.parcel()
            numbers = []
            for which in (0, 1):
                tensor = torch.empty(SIZE + which)
                value = self.value(batch, layer, which)
                self.lanes.compute(lambda tensor=tensor, value=value: tensor.fill_(value))
                numbers.append(parcel.put(tensor))
                self.lanes.spoil_when_freed(parcel._items[-1].on_device)
                del tensor
            parcel.close()
            self.kept[batch, layer] = [parcel, numbers]
            del parcel
            self.watch()

    def backward(self, batch):
        for layer in reversed(range(LAYERS)):
            parcel, numbers = self.kept.pop((batch, layer))
            found = self.seen[batch, layer] = []
            for number in reversed(numbers):
                tensor = parcel.get(number)
                self.lanes.compute(lambda tensor=tensor, found=found: found.append(tensor.clone()))
                del tensor
                self.watch()
            del parcel

    def watch(self):
        """Parcels of which the stash holds something on the device."""
        held = [
            any(item is not None and item.on_device is not None for item in parcel._items)
            for parcel, _ in self.kept.values()
        ]
        self.most = max(self.most, sum(held))

    def right(self):
        return all(
            torch.equal(tensor, torch.full_like(tensor, self.value(batch, layer, which)))
            for (batch, layer), found in self.seen.items()
            for which, tensor in zip((1, 0), found, strict=True)
        )


PLAIN = [("f", 0), ("b", 0), ("f", 1), ("b", 1)]
PIPELINE = [("f", 0), ("f", 1), ("f", 2)]  # warm-up of a stage, then one forward one backward
PIPELINE += [step for n in range(3, 7) for step in (("b", n - 3), ("f", n))]
PIPELINE += [("b", 4), ("b", 5), ("b", 6)]
ORDERS = {"plain": PLAIN, "pipeline": PIPELINE}


def play(order, monkeypatch, seed, deaf="", **bounds):
    run = Run(PlayedLanes(deaf), monkeypatch, **bounds)
    for what, batch in order:
        (run.forward if what == "f" else run.backward)(batch)
    run.lanes.device.finish(seed)
    return run


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("order", ORDERS)
def test_backward_sees_what_forward_kept(monkeypatch, order, seed):
    run = play(ORDERS[order], monkeypatch, seed)
    assert len(run.seen) == LAYERS * len({batch for _, batch in ORDERS[order]})
    assert run.right()


@pytest.mark.parametrize("lane", [COMPUTE, OUT, IN])
def test_a_lane_that_does_not_wait_is_found_out(monkeypatch, lane):
    assert not all(play(PIPELINE, monkeypatch, seed, deaf=lane).right() for seed in range(20))


@pytest.mark.parametrize(("behind", "ahead"), [(1, 1), (2, 1), (1, 2), (1, 0)])
@pytest.mark.parametrize("order", ORDERS)
def test_few_layers_are_on_the_device(monkeypatch, order, behind, ahead):
    run = play(ORDERS[order], monkeypatch, 0, behind=behind, ahead=ahead)
    assert run.right()
    # what leaves, what comes, and the layer that backward is at
    assert run.most <= behind + ahead + 1


def test_the_pool_stops_growing(monkeypatch):
    run = Run(PlayedLanes(), monkeypatch)
    made = []
    for _ in range(3):
        for what, batch in PIPELINE:
            (run.forward if what == "f" else run.backward)(batch)
        made.append(run.stash.pool.allocations)
    assert made[0] == made[1] == made[2]
    # three micro-batches in flight and the one whose forward runs
    assert made[0] <= 2 * LAYERS * 4
    assert run.stash.pool.in_use == 0


def test_all_is_copied_once_but_what_never_left(monkeypatch):
    run = play(PLAIN, monkeypatch, 0)
    a_layer = (2 * SIZE + 1) * 4
    assert run.stash.bytes_out == 2 * LAYERS * a_layer
    assert run.stash.bytes_in == 2 * (LAYERS - 1) * a_layer  # the last layer's did not leave


class Noted(PlayedLanes):
    """Notes the sizes of what comes back."""

    def __init__(self) -> None:
        super().__init__()
        self.came: list[int] = []

    def copy(self, lane, into, source):
        if lane == IN:
            self.came.append(into.numel())
        super().copy(lane, into, source)


def closed_parcels(stash, count):
    """Parcels of one tensor each, of 1, 2, ... numbers."""
    parcels = []
    for size in range(1, count + 1):
        parcel = stash.parcel()
        parcel.put(torch.zeros(size))
        parcel.close()
        parcels.append(parcel)
    return parcels


def test_the_newest_that_is_left_comes_ahead_of_its_use():
    lanes = Noted()
    stash = Stash(CPU, lanes)
    parcels = closed_parcels(stash, 4)
    parcels[3].get(0)  # still on its way out
    assert lanes.came == [3]
    parcels[2].get(0)
    assert lanes.came == [3, 2]
    parcels[0].get(0)  # against the order: the guess is not asked for, and no other is made
    assert lanes.came == [3, 2, 1]
    parcels[1].get(0)
    assert lanes.came == [3, 2, 1]


def test_nothing_of_another_micro_batch_comes_ahead():
    lanes = Noted()
    stash = Stash(CPU, lanes)
    first = closed_parcels(stash, 2)
    stash.begin_group()
    second = closed_parcels(stash, 1)
    second[0].get(0)
    assert lanes.came == []
    first[1].get(0)
    assert lanes.came == [2, 1]


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(3, 4, 5),
        lambda: torch.randn(3, 4, 5).permute(2, 0, 1),
        lambda: torch.randn(7, 4)[2:5],
        lambda: torch.randn(3, 1, 5).to(torch.bfloat16).transpose(0, 1),
        lambda: torch.randn(6).double()[3],
    ],
    ids=["whole", "permuted", "part", "bf16", "number"],
)
def test_shape_strides_and_bits_come_back(make):
    lanes = PlayedLanes()
    stash, tensor = Stash(CPU, lanes), make()
    assert is_dense(tensor)
    parcel = stash.parcel()
    number = parcel.put(tensor)
    parcel.close()
    closed_parcels(stash, 1)
    got = parcel.get(number)
    lanes.device.finish(0)
    assert got.data_ptr() != tensor.data_ptr()
    assert got.stride() == tensor.stride()
    assert got.dtype == tensor.dtype
    assert torch.equal(got, tensor)


@pytest.mark.parametrize(
    "tensor", [torch.zeros(4, 6)[:, :3], torch.zeros(1).expand(4), torch.zeros(0)]
)
def test_what_does_not_fill_its_memory_stays(tensor):
    stash = Stash(CPU, PlayedLanes())
    parcel = stash.parcel()
    number = parcel.put(tensor)
    parcel.close()
    closed_parcels(stash, 1)
    got = parcel.get(number)
    assert got.data_ptr() == tensor.data_ptr()
    assert got.stride() == tensor.stride()


def test_a_tensor_emptied_by_others_is_kept_all_the_same():
    lanes = PlayedLanes()
    stash, tensor = Stash(CPU, lanes), torch.arange(4.0)
    parcel = stash.parcel()
    number = parcel.put(tensor)
    tensor.data = torch.empty(1)  # as Megatron does with what it has sent to the next stage
    parcel.close()
    lanes.device.finish(0)
    assert torch.equal(parcel.get(number), torch.arange(4.0))


def test_a_tensor_is_given_back_once():
    stash = Stash(CPU, PlayedLanes())
    parcel = closed_parcels(stash, 1)[0]
    parcel.get(0)
    with pytest.raises(RuntimeError, match="backward ran a second time"):
        parcel.get(0)


def test_parcels_that_nobody_asks_for_leave_nothing_behind():
    stash = Stash(CPU, PlayedLanes())
    parcels = closed_parcels(stash, 5)
    parcels[3].get(0)  # fetches the one before it
    unclosed = stash.parcel()
    unclosed.put(torch.zeros(3))
    del parcels, unclosed
    closed_parcels(stash, 1)[0].get(0)
    gc.collect()
    assert stash.pool.in_use == 0
    assert stash._waiting == []
    assert stash._guessed == set()


def test_the_pool_holds_no_more_than_was_in_use_at_once():
    pool = HostPool(lambda nbytes: torch.empty(nbytes, dtype=torch.uint8))
    small = [pool.take(4096) for _ in range(4)]
    for buffer in small:
        pool.give(buffer, None)
    assert pool.take(3000) in small
    large = pool.take(12 * 1024)
    assert pool.allocations == 5
    assert pool.in_use + pool.idle == 16 * 1024
    pool.give(large, None)
    assert pool.take(12 * 1024) is large
    assert pool.allocations == 5


@pytest.mark.needs_gpu
def test_copies_beside_a_busy_gpu_are_whole():
    device = torch.device("cuda", torch.cuda.current_device())
    stash = Stash(device, CudaLanes(device))
    size = 1 << 20
    for step in range(3):
        parcels = []
        for layer in range(6):
            parcel = stash.parcel()
            torch.cuda._sleep(10_000_000)
            number = parcel.put(torch.full((size,), float(layer), device=device))
            parcel.close()
            parcels.append((parcel, number))
        for layer in reversed(range(6)):
            parcel, number = parcels.pop()
            torch.cuda._sleep(10_000_000)
            assert bool((parcel.get(number) == layer).all())
        if step == 0:
            made = stash.pool.allocations
    assert stash.pool.allocations == made
    assert stash.pool.in_use == 0


@pytest.mark.needs_gpu
def test_memory_on_the_gpu_does_not_grow_with_what_is_kept():
    device = torch.device("cuda", torch.cuda.current_device())
    stash, size = Stash(device, CudaLanes(device)), 1 << 22
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = []
    for layer in range(8):
        parcel = stash.parcel()
        kept.append((parcel, parcel.put(torch.full((size,), float(layer), device=device))))
        parcel.close()
    assert torch.cuda.max_memory_allocated() - before <= 2 * 4 * size
    for layer in reversed(range(8)):
        parcel, number = kept.pop()
        assert bool((parcel.get(number) == layer).all())
