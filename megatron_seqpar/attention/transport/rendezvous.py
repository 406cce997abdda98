# SPDX-License-Identifier: Apache-2.0
"""Where the two ends of a message between threads meet, and the copy that joins them.

Whichever end is posted second makes the copy, straight from the sent tensor into the received one:
on CPU there and then, on CUDA on the receiver's transfer stream, where it waits for both posts and
is waited for by both ends.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from dataclasses import dataclass, field

import torch

from ...errors import SeqParError

POLL_SECONDS = 0.05


@dataclass(eq=False)
class End:
    """One end of a message, held from its post until it is waited for.

    Attributes:
        sending: the sender's end, or else the receiver's.
        rank, peer: who posted it, and whom it is to or from.
        tensor, kind: as in `Message`.
        posted: what of the poster's stream the copy must follow (CUDA).
        copied: what of the transfer stream the poster must follow (CUDA); set before `done`.
        done: the copy was made (CUDA: given to the transfer stream) or refused.
        failure: why it was refused.
    """

    sending: bool
    rank: int
    peer: int
    tensor: torch.Tensor
    kind: str
    posted: torch.cuda.Event | None = None
    copied: torch.cuda.Event | None = None
    done: threading.Event = field(default_factory=threading.Event)
    failure: str | None = None

    @property
    def pair(self) -> tuple[int, int]:
        """Sender and receiver."""
        return (self.rank, self.peer) if self.sending else (self.peer, self.rank)


class Rendezvous:
    """Shared by the threads of one group. `timeout`, in seconds, bounds each wait."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.stopped = threading.Event()
        self._lock = threading.Lock()
        # (pair, is it the sender's end) -> ends whose other end is not posted yet, in order
        self._alone: dict[tuple[tuple[int, int], bool], deque[End]] = defaultdict(deque)
        self._streams: dict[tuple[int, torch.device], torch.cuda.Stream] = {}

    def transfer_stream(self, rank: int, device: torch.device) -> torch.cuda.Stream:
        """The stream of all copies that `rank` receives on a device."""
        with self._lock:
            if (rank, device) not in self._streams:
                self._streams[rank, device] = torch.cuda.Stream(device)
            return self._streams[rank, device]

    def meet(self, end: End) -> End | None:
        """Add an end; the other end of its message, where that was added before."""
        with self._lock:
            others = self._alone[end.pair, not end.sending]
            if others:
                return others.popleft()
            self._alone[end.pair, end.sending].append(end)
            return None

    def wait(self, end: End) -> None:
        """Return when the copy was made; `SeqParError` when it will not be."""
        waited = 0.0
        while not end.done.wait(POLL_SECONDS):
            waited += POLL_SECONDS
            if self.stopped.is_set() or waited >= self.timeout:
                raise SeqParError(
                    f"rank {end.rank} waits in vain for rank {end.peer} to post its end of a "
                    f"{end.kind} message"
                )
        if end.failure is not None:
            raise SeqParError(end.failure)


def disagreement(send: End, receive: End) -> str | None:
    """How the two ends of a message differ, or None."""
    there, here = send.tensor, receive.tensor
    if (there.shape, there.dtype, send.kind) == (here.shape, here.dtype, receive.kind):
        return None
    return (
        f"rank {receive.rank} expects {receive.kind} {tuple(here.shape)} {here.dtype} from rank "
        f"{send.rank}, which sends {send.kind} {tuple(there.shape)} {there.dtype}"
    )
