# SPDX-License-Identifier: Apache-2.0
"""`estimate`: what a layout takes, in seconds and bytes by part."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ..mfu import Model, model_flops, utilization
from . import communication
from .compute import head_time, layer_time, optimizer_time
from .hardware import Cluster
from .layout import Layout, check
from .memory import Memory, stage_memory, stages


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by part; they add up to `total`.

    gemm, attention, elementwise, overhead: computing of the slowest stage. tp, sp, ep, pp, dp:
    communication that is waited for. bubble: the other stages' share of the pipeline's fill and
    drain. optimizer: with what a step costs whatever its size.
    """

    gemm: float
    attention: float
    elementwise: float
    overhead: float
    tp: float
    sp: float
    ep: float
    pp: float
    dp: float
    bubble: float
    optimizer: float

    @property
    def compute(self) -> float:
        """Seconds that the slowest stage computes."""
        return self.gemm + self.attention + self.elementwise + self.overhead

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return (
            self.compute
            + (self.tp + self.sp + self.ep + self.pp + self.dp)
            + (self.bubble + self.optimizer)
        )


@dataclass(frozen=True)
class Estimate:
    """What a layout takes on a cluster.

    Attributes:
        time: seconds of a step by part.
        memory: bytes by component of one rank of the first, the middle and the last stage.
    """

    model: Model
    cluster: Cluster
    layout: Layout
    time: StepTime
    memory: dict[int, Memory]

    @property
    def step_time(self) -> float:
        """Seconds of a step."""
        return self.time.total

    @cached_property
    def mfu(self) -> float:
        """Model FLOPs utilization, without a discount for the causal mask."""
        layout = self.layout
        flops = model_flops(self.model, layout.sequence_length, layout.global_batch)
        return utilization(flops, self.step_time, layout.ranks, self.cluster.peak)

    @property
    def peak_memory(self) -> float:
        """Bytes of the fullest rank."""
        return max(each.total for each in self.memory.values())

    @property
    def margin(self) -> float:
        """Bytes that are left on the fullest rank; below 0 the layout does not fit."""
        return self.cluster.capacity.value - self.peak_memory

    @property
    def fits(self) -> bool:
        """Whether the fullest rank's memory suffices."""
        return self.margin >= 0


def peak_memory(model: Model, cluster: Cluster, layout: Layout) -> float:
    """Bytes of the fullest rank, without the rest of an estimate."""
    return max(
        stage_memory(model, layout, cluster.constants, stage).total for stage in stages(layout)
    )


def estimate(model: Model, cluster: Cluster, layout: Layout) -> Estimate:
    """What a layout takes. UnsupportedError names the constraint that an impossible one breaks."""
    check(model, layout)
    memory = {
        stage: stage_memory(model, layout, cluster.constants, stage) for stage in stages(layout)
    }
    return Estimate(model, cluster, layout, step_time(model, cluster, layout), memory)


def step_time(model: Model, cluster: Cluster, layout: Layout) -> StepTime:
    """Seconds of a step by part.

    Micro-batches pass the slowest stage one after the other; the others add their time once, for
    fill and drain, divided by the number of virtual stages.
    """
    constants = cluster.constants
    layer = layer_time(model, cluster, layout)
    counts = layout.stage_layers(model.layers)
    tensor = communication.tensor_time(model, cluster, layout)
    expert = communication.expert_time(model, cluster, layout)
    each = layer.compute + layer.sp + tensor + expert
    head = head_time(model, cluster, layout)
    head_tensor = communication.tensor_head_time(model, cluster, layout)
    # the embedding costs next to nothing, so the last stage or an uneven first one is the slowest
    times = [layers * each for layers in counts]
    times[-1] += head + head_tensor
    slowest = max(times)
    at = times.index(slowest)
    layers = counts[at]
    if at != layout.pp - 1:
        head = head_tensor = 0.0
    count = layout.micro_batches
    handover = 0.0
    if layout.pp > 1:
        handover = communication.pipeline_time(model, cluster, layout)
        handover += constants.pp_overhead * slowest
    whole = communication.data_time(model, cluster, layout)
    exposed = whole
    if layout.overlap_dp and layout.zero >= 3:
        # layer by layer, beside computing of every micro-batch
        exposed = max(constants.dp_exposed * whole, whole - count * slowest)
    elif layout.overlap_dp:
        # all but the last micro-batch's backward has nothing to reduce yet
        exposed = max(constants.dp_exposed * whole, whole - slowest * 2 / 3)
    return StepTime(
        gemm=count * (layers * layer.gemm + head),
        attention=count * layers * layer.attention,
        elementwise=count * layers * layer.elementwise,
        overhead=count * layers * layer.overhead,
        tp=count * (layers * tensor + head_tensor),
        sp=count * layers * layer.sp,
        ep=count * layers * expert,
        pp=count * handover,
        dp=exposed,
        bubble=(sum(times) - slowest) / layout.vpp,
        optimizer=optimizer_time(model, cluster, layout) + constants.step_overhead,
    )
