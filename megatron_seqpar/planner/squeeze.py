# SPDX-License-Identifier: Apache-2.0
"""How little free memory a data-parallel reduction through copies finds at the end of a step.

A trainer that gathers gradients and weights in copies made anew in each step asks the caching
allocator for blocks of the size of a rank's weights. What layers kept is free by then, but in
blocks that are too small to serve. Where both do not fit at once, the allocator gives small blocks
back to the device, which waits for all work, and fetches them again in the next step. That takes
time although nothing runs out of memory. Logits, and what one layer's backward needs, are few
large blocks which the copies can use, so they do not count.

Megatron reduces buffers that live as long as the model, and is not slowed down by this.
"""

from __future__ import annotations

from ..mfu import Model
from .hardware import Cluster
from .layout import Layout
from .memory import stage_memory, stages
from .sizes import stage_weights

_FROM = 0.8  # of the memory: fragments make it tight before it is full


def squeeze(model: Model, cluster: Cluster, layout: Layout) -> float:
    """0 where the copies find room on every stage, 1 where on some stage nothing is left."""
    if not layout.copied_reduction or layout.replicas == 1:
        return 0.0
    fullest = max(_asked_for(model, cluster, layout, stage) for stage in stages(layout))
    return min(1.0, max(0.0, (fullest - _FROM) / (1 - _FROM)))


def _asked_for(model: Model, cluster: Cluster, layout: Layout, stage: int) -> float:
    """What a rank holds in small blocks and the copies, over its memory."""
    memory = stage_memory(model, layout, cluster.constants, stage)
    copies = layout.element * stage_weights(model, layout, stage).total
    return (memory.total - memory.moment + copies) / cluster.capacity.value
