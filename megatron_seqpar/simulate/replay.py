# SPDX-License-Identifier: Apache-2.0
"""Replay a schedule's plan on a cluster: `simulate`.

Note: the rules
---------------
Every rank goes through its steps: it posts the step's transfers (a moment a message), computes the
tiles, waits until its transfers of the step are over, merges what arrived, goes on. Without overlap
it waits before it computes.

A transfer is ready when both ends have posted it; the n-th send of a rank to a peer meets the n-th
receive that the peer posts from it, there are no tags. It starts when the sender's port out, the
receiver's port in and, between nodes, one network adapter of each node are free, and keeps them for
bytes / bandwidth; the data is there a latency later. Transfers that wait for a port take it in the
order in which they became ready, so those of one pair never overtake one another. A rank has a port
to its node and one to the network; a cluster says where these are one, and where both directions
are one.

This is a discrete-event simulation with one event a transfer and one a rank's step, so thousands of
transfers take milliseconds.
"""

from __future__ import annotations

from collections import deque
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Any

from ..errors import ScheduleError
from .cluster import Cluster, dtype_name
from .costs import MESSAGES, Costs
from .timeline import OF_THE_RANK, Event, EventKind, Timeline

if TYPE_CHECKING:
    from ..attention.ir import Step, Tile, Transfer
    from ..attention.schedule import Schedule


def simulate(
    schedule: Schedule,
    cluster: Cluster,
    *,
    dtype: object = "bfloat16",
    batch: int = 1,
    overlap: bool = True,
    events: bool = True,
) -> Timeline:
    """The timeline of one pass of a schedule (its own direction) on a cluster.

    Args:
        schedule: a forward or backward schedule.
        cluster: what runs it; rank r of the schedule is rank r of the cluster.
        dtype: of q, k and v: a torch dtype or its name.
        batch: samples in the batch.
        overlap: False waits for the transfers of a step before computing it.
        events: whether to keep every event; sums are kept always.

    Raises:
        ScheduleError: a send without its receive, or ranks that wait for one another for ever.
        ClusterError: the cluster has no figure for the dtype.
    """
    costs = Costs(schedule.problem, cluster, dtype, schedule.direction, batch)
    replay = _Replay(schedule.plan, cluster, costs, overlap, events)
    replay.run()
    ranks = replay.ranks
    return Timeline(
        schedule=schedule.name,
        direction=schedule.direction,
        cluster=cluster.name,
        dtype=dtype_name(dtype),
        batch=batch,
        overlap=overlap,
        makespan=max((rank.now for rank in ranks), default=0.0),
        finish=tuple(rank.now for rank in ranks),
        compute=tuple(rank.compute for rank in ranks),
        merge=tuple(rank.merge for rank in ranks),
        post=tuple(rank.post for rank in ranks),
        wait=tuple(rank.wait for rank in ranks),
        exposed=tuple(rank.exposed for rank in ranks),
        bytes_sent=tuple(rank.bytes_sent for rank in ranks),
        messages_sent=tuple(rank.messages_sent for rank in ranks),
        events=tuple(_in_order(rank.events) for rank in ranks) if events else (),
    )


def _in_order(events: list[Event]) -> tuple[Event, ...]:
    """By start; what a rank does before what its ports do."""
    return tuple(sorted(events, key=lambda event: (event.start, event.kind not in OF_THE_RANK)))


class _Rank:
    """Where one rank is, and its sums."""

    def __init__(self) -> None:
        self.step = 0
        self.now = 0.0  # end of what it has done so far
        self.computed = 0.0  # end of this step's tiles, when overlapped
        self.tiles: list[tuple[Tile, float, float]] = []  # with seconds of kernel and of merge
        self.open = 0  # transfers of this step that are not over
        self.under_way: list[tuple[float, float]] = []  # (ready, arrived) of those that are
        self.seen: set[Any] = set()  # sums that already have a partial result
        self.compute = self.merge = self.post = self.wait = self.exposed = 0.0
        self.bytes_sent = self.messages_sent = 0
        self.events: list[Event] = []


class _Flight:
    """A transfer that both ends have posted."""

    __slots__ = ("latency", "ports", "ready", "seconds", "size", "steps", "transfer", "within")

    def __init__(
        self, transfer: Transfer, ready: float, size: int, cluster: Cluster, ports: tuple[int, ...]
    ) -> None:
        link = cluster.link(transfer.src, transfer.dst)
        assert link is not None, "a rank never sends to itself"
        self.transfer, self.ready, self.size, self.ports = transfer, ready, size, ports
        self.steps = (0, 0)  # of the sender and the receiver
        self.within = link is cluster.intra
        self.seconds, self.latency = size / link.bandwidth, link.latency.value


class _Ports:
    """Ports of all ranks and network adapters of all nodes, by number; how many are free."""

    def __init__(self, size: int, cluster: Cluster) -> None:
        self.cluster = cluster
        nodes = cluster.node(size - 1) + 1
        # by rank: within the node out and in, network out and in; then adapters by node, out and in
        self.free = [1] * (4 * size) + [int(cluster.adapters.value)] * (2 * nodes)
        self.waiting: list[list[tuple[int, _Flight]]] = [[] for _ in self.free]
        self._adapters = 4 * size
        self._in = 1 if cluster.duplex else 0
        self._network = 0 if cluster.one_port else 2

    def of(self, src: int, dst: int) -> tuple[int, ...]:
        """What a transfer between two ranks takes."""
        a, b = self.cluster.node(src), self.cluster.node(dst)
        if a == b:
            return 4 * src, 4 * dst + self._in
        return (
            4 * src + self._network,
            4 * dst + self._network + self._in,
            self._adapters + 2 * a,
            self._adapters + 2 * b + self._in,
        )


class _Replay:
    def __init__(
        self, plan: Any, cluster: Cluster, costs: Costs, overlap: bool, events: bool
    ) -> None:
        self.plan, self.cluster, self.costs = plan, cluster, costs
        self.overlap, self.keep = overlap, events
        self.ranks = [_Rank() for _ in plan]
        self.ports = _Ports(len(plan), cluster) if plan else None
        self.tax = cluster.overlap_tax.value if overlap else 0.0
        self.posted: dict[tuple[int, int, bool], deque[Transfer]] = {}
        self.queue: list[tuple[float, int, int | _Flight]] = []  # ranks that posted, flights over
        self.order = 0

    def run(self) -> None:
        """Until all ranks are through their plans."""
        for rank in range(len(self.ranks)):
            self._begin(rank)
        while self.queue:
            now, _, what = heappop(self.queue)
            if isinstance(what, int):
                self._posted(what, now)
            else:
                self._over(what, now)
        for rank, state in enumerate(self.ranks):
            if state.step < len(self.plan[rank]):
                raise ScheduleError(
                    f"rank {rank} waits for ever at step {state.step}: {state.open} of its "
                    "transfers were never posted by their other end, or too late"
                )

    # ---- one rank's step ----------------------------------------------------------------------

    def _begin(self, rank: int) -> None:
        """Post the transfers of the rank's next step; empty steps pass here."""
        state, steps = self.ranks[rank], self.plan[rank]
        while state.step < len(steps):
            step = steps[state.step]
            state.tiles = [self._timed(state, tile) for tile in step.tiles]
            if step.sends or step.receives:
                seconds = sum(map(self.costs.post_seconds, step.sends))
                seconds += sum(map(self.costs.receive_seconds, step.receives))
                state.open = len(step.sends) + len(step.receives)
                state.under_way = []
                self._spend(rank, EventKind.POST, seconds)
                self._push(state.now, rank)
                return
            self._compute(rank, 1.0)
            state.step += 1

    def _timed(self, state: _Rank, tile: Tile) -> tuple[Tile, float, float]:
        adding = 0.0
        for total, seconds in self.costs.results(tile):
            if total in state.seen:
                adding += seconds
            state.seen.add(total)
        return tile, self.costs.tile_seconds(tile), adding

    def _posted(self, rank: int, now: float) -> None:
        """The rank has posted its step: transfers whose other end was there become ready."""
        state = self.ranks[rank]
        step: Step = self.plan[rank][state.step]
        seconds = sum(kernel + add for _, kernel, add in state.tiles)
        state.computed = now + seconds if self.overlap else now
        for transfer in step.sends:
            state.bytes_sent += self.costs.bytes(transfer)
            state.messages_sent += MESSAGES[transfer.payload.value]
            self._meet(transfer, transfer.src, now, sends=True)
        for transfer in step.receives:
            self._meet(transfer, transfer.dst, now, sends=False)

    def _finish(self, rank: int) -> None:
        """All transfers of the rank's step are over: compute (or have computed), wait, merge."""
        state = self.ranks[rank]
        step: Step = self.plan[rank][state.step]
        if self.overlap:
            seconds = sum(kernel + add for _, kernel, add in state.tiles)
            self._compute(rank, (state.computed - state.now) / seconds if seconds else 1.0)
            state.now = max(state.now, state.computed)  # the same, but for rounding
        arrived = max(end for _, end in state.under_way)
        if arrived > state.now:
            state.exposed += _covered(state.under_way, state.now)
            self._spend(rank, EventKind.WAIT, arrived - state.now)
            state.now = max(state.now, arrived)
        if not self.overlap:
            self._compute(rank, 1.0)
        for transfer in step.receives:
            self._spend(rank, EventKind.MERGE, self.costs.merge_seconds(transfer), transfer)
        state.step += 1
        self._begin(rank)

    def _compute(self, rank: int, stretch: float) -> None:
        for tile, kernel, add in self.ranks[rank].tiles:
            self._spend(rank, EventKind.COMPUTE, kernel * stretch, tile)
            self._spend(rank, EventKind.MERGE, add * stretch, tile)

    def _spend(self, rank: int, kind: EventKind, seconds: float, subject: Any = None) -> None:
        if seconds <= 0:
            return
        state = self.ranks[rank]
        start = state.now
        state.now = start + seconds
        setattr(state, kind.value, getattr(state, kind.value) + seconds)
        if self.keep:
            state.events.append(Event(kind, rank, state.step, start, state.now, subject))

    # ---- transfers ----------------------------------------------------------------------------

    def _push(self, time: float, what: int | _Flight) -> None:
        self.order += 1
        heappush(self.queue, (time, self.order, what))

    def _meet(self, transfer: Transfer, rank: int, now: float, *, sends: bool) -> None:
        pair = transfer.src, transfer.dst
        others = self.posted.get((*pair, not sends))
        if not others:
            self.posted.setdefault((*pair, sends), deque()).append(transfer)
            return
        other = others.popleft()
        if other is not transfer and other != transfer:
            raise ScheduleError(
                f"rank {pair[0]} sends {pair[1]} and rank {pair[1]} expects of it different "
                f"things: {transfer} and {other}, posted as the same message"
            )
        assert self.ports is not None
        size = self.costs.bytes(transfer)
        flight = _Flight(transfer, now, size, self.cluster, self.ports.of(*pair))
        flight.steps = self.ranks[pair[0]].step, self.ranks[pair[1]].step
        self.order += 1
        self._try(self.order, flight, now)

    def _try(self, order: int, flight: _Flight, now: float) -> None:
        """Start a transfer, or have it wait for the first of its ports that is taken."""
        assert self.ports is not None
        free, waiting = self.ports.free, self.ports.waiting
        for port in flight.ports:
            if not free[port]:
                heappush(waiting[port], (order, flight))
                return
        for port in flight.ports:
            free[port] -= 1
        if self.tax:
            for end in (flight.transfer.src, flight.transfer.dst):
                state = self.ranks[end]
                left = state.computed - now
                if left > 0:
                    state.computed += self.tax * min(flight.seconds, left)
        self._push(now + flight.seconds, flight)

    def _over(self, flight: _Flight, now: float) -> None:
        """A transfer leaves its ports: others may take them, ranks may go on."""
        assert self.ports is not None
        free, waiting = self.ports.free, self.ports.waiting
        for port in flight.ports:
            free[port] += 1
        while True:
            # by readiness over all the ports, or a pair's messages might overtake one another
            heads = [
                (waiting[port][0][0], port) for port in flight.ports if free[port] and waiting[port]
            ]
            if not heads:
                break
            order, next_flight = heappop(waiting[min(heads)[1]])
            self._try(order, next_flight, now)
        arrived = now + flight.latency
        transfer = flight.transfer
        for rank, step, kind in zip(
            (transfer.src, transfer.dst),
            flight.steps,
            (EventKind.SEND, EventKind.RECEIVE),
            strict=True,
        ):
            state = self.ranks[rank]
            state.under_way.append((flight.ready, arrived))
            state.open -= 1
            if self.keep:
                state.events.append(
                    Event(
                        kind, rank, step, now - flight.seconds, now, transfer, flight.size,
                        flight.within, flight.latency,
                    )
                )  # fmt: skip
        for rank in (transfer.src, transfer.dst):
            if not self.ranks[rank].open:
                self._finish(rank)


def _covered(intervals: list[tuple[float, float]], start: float) -> float:
    """Length of the union of intervals after `start`."""
    total, end = 0.0, start
    for begin, stop in sorted(intervals):
        if stop > end:
            total += stop - max(begin, end)
            end = stop
    return total
