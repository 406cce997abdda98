# SPDX-License-Identifier: Apache-2.0
"""Transports: how the messages of one step reach their peers.

There are no tags: two ranks post their messages to each other in one agreed order (`verify` proves
it). Ranks here are always *group* ranks.

    base.py           what a transport is, what it promises about streams; a group of one rank
    process_group.py  torch.distributed (NCCL, gloo)
    threads.py        ranks are threads of this process, for tests and for trying things out
    rendezvous.py     where the threads' messages meet
"""

from .base import LocalTransport, Message, Pending, Transport
from .process_group import ProcessGroupTransport, transport_of
from .threads import ThreadTransport

__all__ = [
    "LocalTransport",
    "Message",
    "Pending",
    "ProcessGroupTransport",
    "ThreadTransport",
    "Transport",
    "transport_of",
]
