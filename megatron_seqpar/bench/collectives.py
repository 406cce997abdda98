# SPDX-License-Identifier: Apache-2.0
"""Messages and collectives over the ranks: seconds, bandwidth, and the link that explains them.

`bytes` of a row is the size of the data: of a message, of the buffer that is reduced or gathered
in the end (a rank holds `bytes / P` of it before all-gather and after reduce-scatter), of a rank's
buffer in all-to-all. A rank has to send, and to receive,

    message, ring shift           bytes
    all-gather, reduce-scatter    bytes (P-1) / P
    all-to-all                    bytes (P-1) / P
    all-reduce                    2 bytes (P-1) / P

whatever the algorithm, and `bandwidth` is that over the seconds: of the link, comparable between
operations. A message is half a round trip between two ranks while the others rest; in a ring shift
every rank sends to the next and receives from the one before at once, as a ring of keys and values
does. Every operation's result is checked before it is timed.

The fit takes seconds as latency + sent / bandwidth over all sizes. Beside it stands what the
cluster's file says: its link's bandwidth, and its latency times the steps of a ring.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ClusterError
from ..simulate import Cluster, save_cluster
from ..simulate.calibrate import LinkRow, calibrated, fit_link
from ..simulate.cluster import Link
from .place import Place
from .ranks import Emit, Row, on_ranks, say
from .rounds import interleave, spread

if TYPE_CHECKING:
    import torch

MESSAGE = "message"
SHIFT = "ring shift"
OPERATIONS = (MESSAGE, SHIFT, "all-gather", "reduce-scatter", "all-reduce", "all-to-all")
_ELEMENT = 4  # fp32
_FEW = 8  # up to so many ranks every pair is measured, beyond it rank 0 with each other one


def sent(operation: str, size: int, ranks: int) -> float:
    """Bytes that a rank must send, see the top of this file."""
    if operation in (MESSAGE, SHIFT):
        return float(size)
    share = (ranks - 1) / ranks
    return size * share * (2 if operation == "all-reduce" else 1)


def steps(operation: str, ranks: int) -> int:
    """Messages one after the other that a rank sends in a ring."""
    if operation in (MESSAGE, SHIFT):
        return 1
    return (ranks - 1) * (2 if operation == "all-reduce" else 1)


def pairs_of(ranks: int) -> list[tuple[int, int]]:
    """Which ranks send one another messages."""
    if ranks <= _FEW:
        return [(one, other) for one in range(ranks) for other in range(one + 1, ranks)]
    return [(0, other) for other in range(1, ranks)]


def whole_elements(size: int, ranks: int) -> int:
    """Numbers in a buffer of about `size` bytes that every rank has an equal share of."""
    return max(1, round(size / _ELEMENT / ranks)) * ranks


def measure(
    place: Place, operations: Sequence[str], sizes: Sequence[int], rounds: int
) -> list[Row]:
    """Rows of every operation and size; of messages also one a pair. SeqParError as ranks fail."""
    gathered = on_ranks(_measure, place, place, tuple(operations), tuple(sizes), rounds)
    return [_row(raw, place) for raw in gathered.checked()]


def _row(raw: Row, place: Place) -> Row:
    times = spread(raw["rounds"])
    moved = sent(raw["operation"], raw["bytes"], place.ranks)
    return {
        "operation": raw["operation"],
        "ranks": place.ranks,
        **({"pair": raw["pair"]} if "pair" in raw else {}),
        "within_node": raw["within_node"],
        "bytes": raw["bytes"],
        "status": "ok",
        **times,
        "calls": raw["calls"],
        "bytes_sent_per_rank": moved,
        "bandwidth": moved / times["seconds"],
        "algorithm_bandwidth": raw["bytes"] / times["seconds"],
    }


# ---- on every rank --------------------------------------------------------------------------


def _measure(
    device: torch.device,
    emit: Emit,
    place: Place,
    operations: tuple[str, ...],
    sizes: tuple[int, ...],
    rounds: int,
) -> None:
    import torch.distributed as dist

    from .watch import Watch

    watch, first = Watch(device), dist.get_rank() == 0
    for size in sizes:
        works = _works(device, place, operations, size)
        calls, elements = {}, whole_elements(size, place.ranks)
        for name, work in works.items():
            watch.seconds(work)
            calls[name] = watch.calls_of(watch.seconds(work))

        def timed(name: str, _: int, works: Any = works, calls: Any = calls) -> float:
            return float(watch.seconds(works[name], calls[name]))

        measured = interleave(list(works), rounds, timed)
        if not first:
            continue
        for name in works:
            operation, _, pair = name.partition(" ") if name.startswith(MESSAGE) else (name, "", "")
            ends = [int(rank) for rank in pair.split("-")] if pair else []
            # a round trip is two messages
            seconds = [row[name] / (2 if ends else 1) for row in measured]
            ends_or_all = ends or range(place.ranks)
            within = len({rank // place.node_size for rank in ends_or_all}) == 1
            emit(
                {
                    "operation": operation,
                    **({"pair": ends} if ends else {}),
                    "within_node": within,
                    "bytes": elements * _ELEMENT,
                    "rounds": seconds,
                    "calls": calls[name],
                }
            )
        say(f"{place.ranks} ranks, {elements * _ELEMENT:,} bytes: measured")


def _works(
    device: torch.device, place: Place, operations: tuple[str, ...], size: int
) -> dict[str, Callable[[], object]]:
    """What to time by name, each checked; messages by pair, "message 0-1"."""
    import torch
    import torch.distributed as dist

    from ..attention import ProcessGroupTransport

    assert dist.group.WORLD is not None
    transport = ProcessGroupTransport(dist.group.WORLD)
    transport.prepare(device)
    elements = whole_elements(size, place.ranks)
    mine = torch.full((elements,), float(transport.rank + 1), device=device)
    works: dict[str, Callable[[], object]] = {}
    for operation in operations:
        if operation == MESSAGE:
            for pair in pairs_of(place.ranks):
                name = f"{MESSAGE} {pair[0]}-{pair[1]}"
                works[name] = partial(_round_trip, transport, pair, mine, torch.empty_like(mine))
        elif operation == SHIFT:
            works[operation] = _shift(transport, mine)
        else:
            works[operation] = _collective(operation, transport.rank, place.ranks, mine)
    return works


def _round_trip(
    transport: Any, pair: tuple[int, int], mine: torch.Tensor, arrived: torch.Tensor
) -> None:
    from ..attention.transport import Message

    if transport.rank not in pair:
        return
    starts = transport.rank == pair[0]
    peer = pair[1] if starts else pair[0]
    out, back = [Message(peer, mine, "bench")], [Message(peer, arrived, "bench")]
    transport.exchange(out if starts else [], [] if starts else back).wait()
    transport.exchange([] if starts else out, back if starts else []).wait()


def _shift(transport: Any, mine: torch.Tensor) -> Callable[[], object]:
    import torch

    from ..attention.transport import Message

    arrived = torch.empty_like(mine)
    after = (transport.rank + 1) % transport.size
    before = (transport.rank - 1) % transport.size

    def work() -> None:
        sends = [Message(after, mine, "bench")]
        transport.exchange(sends, [Message(before, arrived, "bench")]).wait()

    work()
    _check(SHIFT, arrived, float(before + 1))
    return work


def _collective(operation: str, rank: int, ranks: int, mine: torch.Tensor) -> Callable[[], object]:
    import torch
    import torch.distributed as dist

    share = mine.numel() // ranks
    total = ranks * (ranks + 1) / 2
    by_rank = torch.arange(1, ranks + 1, device=mine.device, dtype=mine.dtype)
    by_rank = by_rank.repeat_interleave(share)
    if operation == "all-gather":
        out, part = torch.empty_like(mine), mine[:share].clone()
        work: Callable[[], object] = partial(dist.all_gather_into_tensor, out, part)
        expected: Any = by_rank
    elif operation == "reduce-scatter":
        out = torch.empty_like(mine[:share])
        work, expected = partial(dist.reduce_scatter_tensor, out, mine), total
    elif operation == "all-to-all":
        out = torch.empty_like(mine)
        work, expected = partial(dist.all_to_all_single, out, mine), by_rank
    else:
        out = mine.clone()  # sums of sums grow; zeros are as long on the way
        work, expected = partial(dist.all_reduce, out), total
    work()
    _check(operation, out, expected)
    if operation == "all-reduce":
        out.zero_()
    return work


def _check(operation: str, found: torch.Tensor, expected: Any) -> None:
    if not bool((found == expected).all()):
        raise RuntimeError(f"{operation} gave wrong numbers: its times would mean nothing")


# ---- fits -----------------------------------------------------------------------------------


def fits(rows: Sequence[Row], place: Place, cluster: Cluster) -> list[Row]:
    """What latency and bandwidth explain each operation's rows, beside the cluster's own.

    One entry an operation, of messages one within a node and one between nodes. An entry without a
    fit says why. Bandwidths in bytes/s, latencies in seconds.
    """
    found = []
    kinds = dict.fromkeys((row["operation"], row["within_node"]) for row in rows)
    for operation, within in kinds:
        mine = [r for r in rows if (r["operation"], r["within_node"]) == (operation, within)]
        link = cluster.intra if within else cluster.inter
        entry: Row = {
            "operation": operation,
            "ranks": place.ranks,
            "within_node": within,
            "assumed_latency": link.latency.value * steps(operation, place.ranks),
            "assumed_bandwidth": link.bandwidth,
            "assumed_basis": [str(link.latency.basis), str(link.line_rate.basis)],
        }
        try:
            entry |= _fitted(mine, link)
        except ClusterError as why:
            entry["why_no_fit"] = str(why)
        found.append(entry)
    return found


def _fitted(rows: Sequence[Row], link: Link) -> Row:
    fitted = fit_link(link_rows(rows), link, "bench collectives")
    latency, bandwidth = fitted.latency.value, fitted.bandwidth
    errors = [
        abs((latency + row["bytes_sent_per_rank"] / bandwidth) / row["seconds"] - 1) for row in rows
    ]
    return {
        "latency": latency,
        "bandwidth": bandwidth,
        "median_error": statistics.median(errors),
        "worst_error": max(errors),
    }


def link_rows(rows: Sequence[Row]) -> list[LinkRow]:
    """Rows as the calibration takes them: what a rank sends, and the seconds that takes."""
    return [
        LinkRow(int(row["bytes_sent_per_rank"]), row["seconds"], row["within_node"])
        for row in rows
        if row["status"] == "ok" and row["bytes_sent_per_rank"] > 0
    ]


def messages(rows: Sequence[Row]) -> list[LinkRow]:
    """Those of the messages, which are what links of a cluster are described by."""
    return link_rows([row for row in rows if row["operation"] == MESSAGE])


def save_measured(cluster: Cluster, rows: Sequence[Row], source: str, path: Path) -> None:
    """Write the cluster with the links that the messages show; others keep their numbers.

    Raises ClusterError where no message was measured, or at one size only.
    """
    measured = messages(rows)
    if not measured:
        raise ClusterError(f"--save-cluster {path}: no messages were measured; see --operations")
    known, _ = calibrated(cluster, [], measured, source, path.stem)
    save_cluster(known, path)
