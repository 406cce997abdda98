# SPDX-License-Identifier: Apache-2.0
"""What a schedule costs on a cluster, in a few numbers: what `auto` compares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .cluster import Cluster
from .replay import simulate
from .timeline import Timeline

if TYPE_CHECKING:
    from ..attention.schedule import Schedule


@dataclass(frozen=True)
class Prediction:
    """Both passes of one attention call; times in seconds.

    Attributes:
        forward_s, backward_s: until the last rank is done.
        forward_wait_share, backward_wait_share: share of all rank-time spent waiting for transfers.
        exposed_share: share of all rank-time, of both passes, in which a rank waited while its
            transfers were under way.
        idle_fraction: share of all rank-time, of both passes, in which no tile was computed.
        bytes_total: bytes that all ranks send.
        bytes_busiest: bytes that the rank sends that sends most.
        messages_busiest: the most messages that a rank sends.
    """

    forward_s: float
    backward_s: float
    forward_wait_share: float
    backward_wait_share: float
    exposed_share: float
    idle_fraction: float
    bytes_total: int
    bytes_busiest: int
    messages_busiest: int

    @property
    def total_s(self) -> float:
        """Both passes."""
        return self.forward_s + self.backward_s

    @classmethod
    def of(cls, forward: Timeline, backward: Timeline) -> Prediction:
        """From the timelines of both passes."""
        both = tuple(zip(forward.bytes_sent, backward.bytes_sent, strict=True))
        messages = zip(forward.messages_sent, backward.messages_sent, strict=True)
        total = forward.size * (forward.makespan + backward.makespan)
        computed = sum(forward.compute) + sum(backward.compute)
        exposed = sum(forward.exposed) + sum(backward.exposed)
        return cls(
            forward_s=forward.makespan,
            backward_s=backward.makespan,
            forward_wait_share=forward.wait_share,
            backward_wait_share=backward.wait_share,
            exposed_share=exposed / total if total else 0.0,
            idle_fraction=1.0 - computed / total if total else 0.0,
            bytes_total=sum(map(sum, both)),
            bytes_busiest=max(map(sum, both), default=0),
            messages_busiest=max(map(sum, messages), default=0),
        )


def predict(
    schedule: Schedule,
    cluster: Cluster,
    dtype: object = "bfloat16",
    batch: int = 1,
    *,
    overlap: bool = True,
) -> Prediction:
    """Simulate both passes of a forward schedule; arguments and errors as of `simulate`."""
    forward, backward = (
        simulate(each, cluster, dtype=dtype, batch=batch, overlap=overlap, events=False)
        for each in (schedule, schedule.backward())
    )
    return Prediction.of(forward, backward)
