# SPDX-License-Identifier: Apache-2.0
"""What a rank really sent and computed, to be held against the schedule's own numbers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Counters:
    """Counts since the last `reset`, of one rank.

    Attributes:
        messages: point-to-point messages sent.
        bytes: bytes sent.
        bytes_by_kind: the same by payload ("kv", "q", "out", ...).
        forward_calls, backward_calls: attention kernel calls (tiles).
    """

    messages: int = 0
    bytes: int = 0
    bytes_by_kind: Counter[str] = field(default_factory=Counter)
    forward_calls: int = 0
    backward_calls: int = 0

    def sent(self, kind: str, size: int) -> None:
        """Count one message of `size` bytes."""
        self.messages += 1
        self.bytes += size
        self.bytes_by_kind[kind] += size

    def as_dict(self) -> dict[str, int | dict[str, int]]:
        """Plain values, for a report."""
        return {
            "messages": self.messages,
            "bytes": self.bytes,
            "bytes_by_kind": dict(self.bytes_by_kind),
            "forward_calls": self.forward_calls,
            "backward_calls": self.backward_calls,
        }

    def reset(self) -> None:
        """Start again from zero."""
        self.messages = self.bytes = self.forward_calls = self.backward_calls = 0
        self.bytes_by_kind.clear()
