# SPDX-License-Identifier: Apache-2.0
"""Bytes that this rank sends through torch.distributed.

Convention. What is counted is the *payload a rank puts on the wire under the standard ring
algorithm*, for a group of n ranks, whatever algorithm the backend really uses:

    all_reduce       2 (n-1)/n x tensor         reduce-scatter, then all-gather
    all_gather       (n-1) x this rank's input  n-1 chunks pass each rank
    reduce_scatter   (n-1)/n x input
    all_to_all       input less the part that stays
    send             the tensor                 isend, batch_isend_irecv and send alike
    broadcast, reduce  (n-1)/n x tensor         the group's (n-1) x tensor, shared evenly
    gather           this rank's input          nothing on the root
    scatter          (n-1)/n x input            on the root; nothing elsewhere

Receiving is not counted, barriers carry nothing. Sums over a group are exact; fractions of a byte
are rounded per call.

*Note: where the count happens.* Every Python call of torch.distributed ends in a method of
`ProcessGroup`. Those methods are wrapped, not the module's functions: a copy made with `from
torch.distributed import all_reduce` is counted too, private names such as `_all_gather_base` are,
coalesced calls are counted once, and the identity checks inside torch (`op is isend`) still hold.
Not seen: communication that bypasses ProcessGroup (user buffers of Transformer Engine, functional
collectives of compiled code).
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass
class Traffic:
    """Calls made and bytes sent."""

    calls: int = 0
    bytes: int = 0

    def add(self, sent: int) -> None:
        """Count one call that sends `sent` bytes."""
        self.calls += 1
        self.bytes += sent


def _nbytes(value: Any) -> int:
    """Bytes of a tensor, or of all the tensors in nested lists."""
    if isinstance(value, (list, tuple)):
        return sum(_nbytes(item) for item in value)
    return int(value.numel()) * int(value.element_size())


def _share(numerator: int, size: int, payload: int) -> int:
    return round(numerator * payload / size)


# Each rule: (group, positional arguments, keyword arguments) -> bytes this rank sends.
Rule = Callable[[Any, tuple[Any, ...], dict[str, Any]], int]


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], at: int, *names: str) -> Any:
    """The argument at a position, or under one of its names (overloads name it differently)."""
    if len(args) > at:
        return args[at]
    for name in names:
        if name in kwargs:
            return kwargs[name]
    return None


def _root(args: tuple[Any, ...], kwargs: dict[str, Any], at: int) -> int:
    """The root rank, in an options object or by itself."""
    value = _argument(args, kwargs, at, "opts", "root")
    return int(getattr(value, "rootRank", value))


def _all_reduce(group: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    n = group.size()
    return _share(2 * (n - 1), n, _nbytes(_argument(args, kwargs, 0, "tensors", "tensor")))


def _spread(group: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    n = group.size()
    return _share(n - 1, n, _nbytes(_argument(args, kwargs, 0, "tensors", "tensor")))


def _all_gather(group: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    names = ("input_tensors", "input_tensor", "input", "inputs", "input_list")
    return (group.size() - 1) * _nbytes(_argument(args, kwargs, 1, *names))


def _reduce_scatter(group: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    n = group.size()
    return _share(n - 1, n, _nbytes(_argument(args, kwargs, 1, "input_tensors", "input", "inputs")))


def _all_to_all_single(group: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    tensor = _argument(args, kwargs, 1, "input")
    splits = _argument(args, kwargs, 3, "input_split_sizes")
    payload = _nbytes(tensor)
    if splits is None or len(splits) == 0:
        return _share(group.size() - 1, group.size(), payload)
    rows = [int(each) for each in splits]  # Megatron's experts give a NumPy array
    return payload - (rows[group.rank()] * payload // sum(rows) if sum(rows) else 0)


def _all_to_all(group: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    tensors = _argument(args, kwargs, 1, "input_tensors")
    return _nbytes(tensors) - _nbytes(tensors[group.rank()])


def _send(group: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    return _nbytes(_argument(args, kwargs, 0, "tensors"))


def _gather(group: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    if group.rank() == _root(args, kwargs, 2):
        return 0
    return _nbytes(_argument(args, kwargs, 1, "input_tensors", "input_tensor"))


def _scatter(group: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    if group.rank() != _root(args, kwargs, 2):
        return 0
    n = group.size()
    return _share(n - 1, n, _nbytes(_argument(args, kwargs, 1, "input_tensors")))


METHODS: dict[str, tuple[str, Rule]] = {
    "allreduce": ("all_reduce", _all_reduce),
    "allreduce_coalesced": ("all_reduce", _all_reduce),
    "allgather": ("all_gather", _all_gather),
    "allgather_coalesced": ("all_gather", _all_gather),
    "_allgather_base": ("all_gather", _all_gather),
    "allgather_into_tensor_coalesced": ("all_gather", _all_gather),
    "reduce_scatter": ("reduce_scatter", _reduce_scatter),
    "_reduce_scatter_base": ("reduce_scatter", _reduce_scatter),
    "reduce_scatter_tensor_coalesced": ("reduce_scatter", _reduce_scatter),
    "alltoall_base": ("all_to_all", _all_to_all_single),
    "alltoall": ("all_to_all", _all_to_all),
    "send": ("send", _send),
    "broadcast": ("broadcast", _spread),
    "reduce": ("reduce", _spread),
    "gather": ("gather", _gather),
    "scatter": ("scatter", _scatter),
}
"""Methods of ProcessGroup that send: the kind they count as, and their rule."""

_running: list[TrafficMeter] = []
_originals: dict[str, Any] = {}
_lock = threading.Lock()


class TrafficMeter:
    """Counts while it runs. Several may run at once; the last to stop leaves torch as it was.

    `by_kind` maps a kind (`send`, `all_reduce`, ...) to its Traffic, `by_group` the description
    of a process group to its Traffic.
    """

    def __init__(self) -> None:
        self.by_kind: dict[str, Traffic] = {}
        self.by_group: dict[str, Traffic] = {}

    @property
    def bytes(self) -> int:
        """All bytes counted."""
        return sum(traffic.bytes for traffic in self.by_kind.values())

    @property
    def calls(self) -> int:
        """All calls counted."""
        return sum(traffic.calls for traffic in self.by_kind.values())

    def reset(self) -> None:
        """Forget what was counted."""
        self.by_kind.clear()
        self.by_group.clear()

    def start(self) -> None:
        """Count from here on; harmless when running."""
        with _lock:
            if self not in _running:
                _running.append(self)
            if not _originals:
                _wrap()

    def stop(self) -> None:
        """Count no more; harmless when stopped."""
        with _lock:
            if self in _running:
                _running.remove(self)
            if not _running:
                _unwrap()

    @contextmanager
    def running(self) -> Iterator[TrafficMeter]:
        """Count inside a with-block."""
        self.start()
        try:
            yield self
        finally:
            self.stop()

    def count(self, kind: str, group: str, sent: int) -> None:
        """Count one call of `sent` bytes."""
        self.by_kind.setdefault(kind, Traffic()).add(sent)
        self.by_group.setdefault(group, Traffic()).add(sent)


def _wrap() -> None:
    from torch.distributed import ProcessGroup

    def counted(original: Any, kind: str, rule: Rule) -> Any:
        @functools.wraps(original)
        def method(group: Any, *args: Any, **kwargs: Any) -> Any:
            work = original(group, *args, **kwargs)
            sent = rule(group, args, kwargs)
            name = group.group_desc
            for meter in tuple(_running):
                meter.count(kind, name, sent)
            return work

        return method

    for name, (kind, rule) in METHODS.items():
        original = getattr(ProcessGroup, name, None)
        if original is not None:
            _originals[name] = original
            setattr(ProcessGroup, name, counted(original, kind, rule))


def _unwrap() -> None:
    from torch.distributed import ProcessGroup

    for name, original in _originals.items():
        setattr(ProcessGroup, name, original)
    _originals.clear()
