# SPDX-License-Identifier: Apache-2.0
"""What the executor needs of a group of ranks: one call that posts, one handle that is waited for.

Note: streams and buffers
-------------------------
`exchange` posts all sends and receives of a step and returns at once; the handle's `wait` makes the
receives usable. On CUDA nobody waits on the host for data, only streams wait for streams. Every
transport keeps these rules, `compute` being the stream that is current in the calling thread:

    send      the copy follows what `compute` was given before the post (the data is finished)
    receive   the copy follows what `compute` was given before the post (the buffer is free)
    wait      what `compute` is given later follows the copies, of sends as well as of receives

and a transport holds every posted tensor until `wait`. So the caller may drop a tensor as soon as
it is posted, and the allocator gives its memory away only behind the last copy. Between post and
`wait` the caller leaves sends unchanged and receives alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ...errors import SeqParError
from ..counters import Counters


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


class Nothing:
    """See `Pending`: nothing was posted."""

    def wait(self) -> None:
        """Return at once."""


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
        return Nothing()
