# SPDX-License-Identifier: Apache-2.0
"""The SP axis in `megatron.core.parallel_state`.

The axis takes stock context parallelism's place: Megatron is initialised with
`context_parallel_size` equal to the SP size, so gradient reduction, the distributed optimizer,
loss reductions, checkpoint replica ids and pipeline shapes are right without a patch. On top of
it the axis has a communicator of its own over the same ranks. Attention's point-to-point traffic
is in flight while other collectives of the context-parallel group may run, and two kinds of
traffic on one communicator would have to be issued in one order everywhere.

`parallel_state` gains `get_sequence_parallel_group`, `get_sequence_parallel_world_size`,
`get_sequence_parallel_rank` and `get_sequence_parallel_global_ranks`, and
`ProcessGroupCollection.use_mpu_process_groups()` returns collections with `.sp`. "Rank" alone
never appears here: it is a group rank (position on the axis) or a global rank.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_seqpar.errors import SeqParError, UnsupportedError
from megatron_seqpar.integration import nodes, state


@dataclass(frozen=True)
class Axis:
    """The SP axis of this process.

    group: communicator over the axis; with one rank the stock context-parallel group itself, or
        None when that has more ranks, as under stock context parallelism.
    global_ranks: global rank of every group rank, in order of token ownership.
    rank: this process's group rank.
    transport: the one transport that every attention layer of this process sends through, so
        that its counters cover the whole step; None when size is 1.
    node_size: consecutive ranks of the axis that share a node.
    cluster: what the `auto` schedule reckons with, the same on every rank; None when size is 1.
    """

    group: dist.ProcessGroup | None
    global_ranks: tuple[int, ...]
    rank: int
    transport: Any
    node_size: int = 1
    cluster: Any = None

    @property
    def size(self) -> int:
        """Number of ranks on the axis."""
        return len(self.global_ranks)


_axis: Axis | None = None


def current() -> Axis:
    """The axis of this process. Raises `SeqParError` before Megatron made its groups."""
    if _axis is None:
        raise SeqParError(
            "the sequence-parallel axis is not initialised: call "
            "megatron.core.parallel_state.initialize_model_parallel after "
            "megatron_seqpar.integration.install()"
        )
    return _axis


def initialized() -> bool:
    """Whether the axis exists."""
    return _axis is not None


def get_sequence_parallel_group(check_initialized: bool = True) -> dist.ProcessGroup | None:
    """The SP group that this process belongs to."""
    if _axis is None and not check_initialized:
        return None
    return current().group


def get_sequence_parallel_world_size() -> int:
    """Number of ranks of this process's SP group."""
    return current().size


def get_sequence_parallel_rank() -> int:
    """This process's group rank on the SP axis, equal to the index of its token chunk."""
    return current().rank


def get_sequence_parallel_global_ranks(check_initialized: bool = True) -> list[int] | None:
    """Global ranks of this process's SP group, in order of token ownership."""
    if _axis is None and not check_initialized:
        return None
    return list(current().global_ranks)


GETTERS: tuple[Callable[..., Any], ...] = (
    get_sequence_parallel_group,
    get_sequence_parallel_world_size,
    get_sequence_parallel_rank,
    get_sequence_parallel_global_ranks,
)


def register_getters() -> None:
    """Add the getters to `megatron.core.parallel_state`."""
    from megatron.core import parallel_state

    for getter in GETTERS:
        setattr(parallel_state, getter.__name__, getter)


def remove_getters() -> None:
    """Take the getters away and forget the axis."""
    from megatron.core import parallel_state

    reset()
    for getter in GETTERS:
        if getattr(parallel_state, getter.__name__, None) is getter:
            delattr(parallel_state, getter.__name__)


def build(groups: Sequence[Sequence[int]], timeout_minutes: float) -> Axis:
    """Make the axis over the ranks of Megatron's context-parallel group.

    groups: global ranks of every context-parallel group of the job. Every rank makes all of
        them, in this order: a communicator that only its members take part in making hangs
        where NCCL splits communicators off the default one.

    The communicator is warmed with one reduction, because one that first comes to life inside a
    pipeline stage's point-to-point call can deadlock.
    """
    global _axis
    from megatron.core import parallel_state

    cp_group = parallel_state.get_context_parallel_group()
    global_ranks = tuple(dist.get_process_group_ranks(cp_group))
    if not state.active():
        # One rank; with stock context parallelism, which is not our axis, no group has that rank
        # alone.
        alone = cp_group if len(global_ranks) == 1 else None
        _axis = Axis(alone, (dist.get_rank(),), 0, transport=None)
        return _axis
    if len(global_ranks) != state.config().sequence_parallel_size:
        raise UnsupportedError(
            f"--sequence-parallel-size {state.config().sequence_parallel_size}: the "
            f"context-parallel group has {len(global_ranks)} ranks; initialise Megatron with "
            "context_parallel_size equal to the sequence-parallel size."
        )
    mine = None
    for ranks in groups:
        group = parallel_state.create_group(
            list(ranks),
            timeout=timedelta(minutes=timeout_minutes),
            group_desc="SEQUENCE_PARALLEL_GROUP",
        )
        if tuple(ranks) == global_ranks:
            mine = group
    if mine is None:
        raise SeqParError(
            f"Megatron made no context-parallel group of ranks {list(global_ranks)} that the "
            "sequence-parallel axis could follow"
        )
    dist.all_reduce(torch.zeros(1, device=_communication_device(mine)), group=mine)
    from megatron_seqpar.attention.transport import ProcessGroupTransport

    node_size = nodes.of_axis(global_ranks, state.config())
    _axis = Axis(
        mine,
        global_ranks,
        dist.get_rank(mine),
        ProcessGroupTransport(mine),
        node_size,
        _shared_cluster(mine, node_size),
    )
    return _axis


def _shared_cluster(group: dist.ProcessGroup, node_size: int) -> Any:
    """The cluster as the first rank of the axis sees it, on every rank of the axis."""
    cluster = nodes.cluster_of(state.config(), node_size)
    if dist.get_backend(group) == "fake":  # one process stands for all; nothing arrives
        return cluster
    told = [cluster]
    first = dist.get_global_rank(group, 0)
    dist.broadcast_object_list(told, src=first, group=group, device=_communication_device(group))
    return told[0]


@contextlib.contextmanager
def _context_parallel_groups() -> Iterator[list[list[int]]]:
    """Collect the ranks of every context-parallel group that Megatron makes inside the block."""
    from megatron.core import parallel_state

    create_group = parallel_state.create_group
    signature = inspect.signature(create_group)
    found: list[list[int]] = []

    def recording(*args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(*args, **kwargs).arguments
        if arguments.get("group_desc") == "CONTEXT_PARALLEL_GROUP":
            found.append(list(arguments["ranks"]))
        return create_group(*args, **kwargs)

    parallel_state.create_group = recording
    try:
        yield found
    finally:
        parallel_state.create_group = create_group


def _communication_device(group: dist.ProcessGroup) -> torch.device:
    """Where tensors must live to travel through `group`."""
    if dist.get_backend(group) in ("gloo", "fake") or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def reset() -> None:
    """Forget the axis; its communicator goes with Megatron's own at process exit."""
    global _axis
    _axis = None


def wrap_initialize_model_parallel(original: Callable[..., None]) -> Callable[..., None]:
    """Patch for `parallel_state.initialize_model_parallel`: fold the size in, then add the axis."""
    signature = inspect.signature(original)

    def initialize_model_parallel(*args: Any, **kwargs: Any) -> None:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        if state.active():
            size = state.config().sequence_parallel_size
            asked = bound.arguments["context_parallel_size"]
            if asked not in (1, size):
                raise UnsupportedError(
                    f"--context-parallel-size {asked} with --sequence-parallel-size {size}: the "
                    "sequence-parallel axis takes context parallelism's place; drop "
                    "--context-parallel-size."
                )
            bound.arguments["context_parallel_size"] = size
        with _context_parallel_groups() as groups:
            original(*bound.args, **bound.kwargs)
        build(groups, bound.arguments["distributed_timeout_minutes"])

    initialize_model_parallel.__doc__ = original.__doc__
    return initialize_model_parallel


def wrap_destroy_model_parallel(original: Callable[[], None]) -> Callable[[], None]:
    """Patch for `parallel_state.destroy_model_parallel`: forget the axis as well."""

    def destroy_model_parallel() -> None:
        reset()
        original()

    destroy_model_parallel.__doc__ = original.__doc__
    return destroy_model_parallel


def wrap_use_mpu_process_groups(original: Callable[..., Any]) -> Callable[..., Any]:
    """Patch for `ProcessGroupCollection.use_mpu_process_groups`: set `.sp` on the collection."""

    def use_mpu_process_groups(cls: type, required_pgs: list[str] | None = None) -> Any:
        if required_pgs is not None:
            required_pgs = [name for name in required_pgs if name != "sp"]
        collection = original(required_pgs)
        if _axis is not None:
            collection.sp = _axis.group
        return collection

    use_mpu_process_groups.__doc__ = original.__doc__
    return use_mpu_process_groups


def require_matching(pg_collection: Any) -> Axis:
    """The axis, after checking that a model's groups belong to it.

    pg_collection: the collection a layer was built with, or None.
    Raises `UnsupportedError` when the collection splits the sequence over other ranks.
    """
    axis = current()
    cp_group = getattr(pg_collection, "cp", None) if pg_collection is not None else None
    if cp_group is not None:
        ranks = tuple(dist.get_process_group_ranks(cp_group))
        if ranks != axis.global_ranks:
            raise UnsupportedError(
                f"pg_collection.cp {list(ranks)}: a model whose context-parallel group is not "
                f"the sequence-parallel axis {list(axis.global_ranks)} of this process cannot "
                "use it; build the model with the default process groups."
            )
    return axis
