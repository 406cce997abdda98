# SPDX-License-Identifier: Apache-2.0
"""torch.distributed process groups: NCCL and gloo, grouped point-to-point calls only.

Lone sends on NCCL create a communicator for each pair of ranks when first used, and deadlock.

Note: what NCCL's process group does and does not do (torch 2.6 to 2.11)
-----------------------------------------------------------------------
`batch_isend_irecv` puts all messages into one NCCL group on the group's own stream, which first
waits for the stream that is current in the calling thread, and returns one work for all of them;
`work.wait()` makes the stream current *then* wait for it, on the host it returns at once. So both
must be called under the compute stream, which autograd sees to in backward. Point-to-point tensors
are marked with `record_stream` whatever TORCH_NCCL_AVOID_RECORD_STREAMS says; that alone would give
their memory back late and at random, so they are held here until `wait` besides. Ranks that talk to
some peers only may do so once the communicator exists: `prepare` makes it with all ranks.

Gloo moves host memory only: handed a CUDA tensor it would read a device address on the host. Such
tensors pass through host memory here: slow, for trying things out where ranks share a GPU.
"""

from __future__ import annotations

import atexit
import logging
from collections.abc import Sequence
from functools import cached_property

import torch
import torch.distributed as dist

from ..counters import Counters
from .base import LocalTransport, Message, Nothing, Pending, Transport

logger = logging.getLogger(__name__)


class ProcessGroupTransport:
    """See `Transport`: a torch.distributed process group (of this rank's SP axis)."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = group.rank(), group.size()
        self.counters = Counters()
        self._prepared = False

    def prepare(self, device: torch.device) -> None:
        if self._prepared or self.size == 1 or device.type != "cuda":
            return
        if self.moves_host_memory_only:
            logger.warning("gloo moves no GPU memory: attention's transfers pass through the host")
        else:
            # NCCL builds the group's communicator in its first collective, which all ranks must
            # join; in the steps that follow, ranks talk only to some peers.
            dist.all_reduce(torch.zeros(1, device=device), group=self.group)
        self._prepared = True

    def gather_lengths(self, local: int, device: torch.device) -> tuple[int, ...]:
        host = device.type == "cuda" and self.moves_host_memory_only
        own = torch.tensor([local], device="cpu" if host else device)
        every = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(every, own, group=self.group)
        return tuple(int(length) for length in torch.cat(every).tolist())

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        if not sends and not receives:
            return Nothing()
        for m in sends:
            self.counters.sent(m.kind, m.tensor.nbytes)
        messages = (*sends, *receives)
        if messages[0].tensor.device.type == "cuda" and self.moves_host_memory_only:
            return self._through_host(sends, receives)
        return _Works(self._post(sends, receives), messages)

    @cached_property
    def moves_host_memory_only(self) -> bool:
        """Whether CUDA tensors must pass through host memory: the group has only gloo for them."""
        backends = dict(pair.split(":") for pair in dist.get_backend_config(self.group).split(","))
        return backends.get("cuda", "gloo") == "gloo"

    def _post(self, sends: Sequence[Message], receives: Sequence[Message]) -> list[dist.Work]:
        operations = [
            dist.P2POp(dist.isend, m.tensor, group=self.group, group_peer=m.peer) for m in sends
        ]
        operations += [
            dist.P2POp(dist.irecv, m.tensor, group=self.group, group_peer=m.peer) for m in receives
        ]
        works: list[dist.Work] = dist.batch_isend_irecv(operations)
        return works

    def _through_host(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        # copying to ordinary host memory waits for the current stream, which has the data ready
        outgoing = [Message(m.peer, m.tensor.cpu(), m.kind) for m in sends]
        incoming = [
            Message(m.peer, torch.empty_like(m.tensor, device="cpu"), m.kind) for m in receives
        ]
        arrivals = tuple((m.tensor, h.tensor) for m, h in zip(receives, incoming, strict=True))
        return _Works(self._post(outgoing, incoming), (*outgoing, *incoming), arrivals)


class _Works:
    """Works of one grouped call; holds the tensors until waited for.

    `arrivals` are (tensor, host memory that it is received in), copied when waited for.
    """

    def __init__(
        self,
        works: list[dist.Work],
        messages: tuple[Message, ...],
        arrivals: tuple[tuple[torch.Tensor, torch.Tensor], ...] = (),
    ) -> None:
        self.works, self.messages, self.arrivals = works, messages, arrivals

    def wait(self) -> None:
        for work in self.works:
            work.wait()
        for tensor, host in self.arrivals:
            tensor.copy_(host)
        self.works, self.messages, self.arrivals = [], (), ()


_TRANSPORTS: dict[str, ProcessGroupTransport] = {}
# A group that lives until the interpreter is torn down can abort the process: gloo's threads are
# still there. At exit this is the last to hold groups that their owner destroyed.
atexit.register(_TRANSPORTS.clear)


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
