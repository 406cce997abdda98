# SPDX-License-Identifier: Apache-2.0
"""Bytes that one rank of a pipeline stage holds at the fullest moment of a step, by component."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ..mfu import Model
from .constants import Constants
from .layout import Layout
from .memory_kernels import Kernels
from .memory_layer import gathered_tokens, kept_per_layer, layer_moment, loss_moment
from .sizes import layer_weights, stage_weights

_OPTIMIZER = {2: 12, 4: 8}  # Adam's two moments, and the fp32 weight where it is not the weight


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank by component.

    activations: what layers keep for the micro-batches in flight, attention scores included.
    moment: the larger of one layer's backward and the loss, whichever comes on top.
    context: what the process takes before anything is allocated.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    moment: float
    context: float

    @property
    def total(self) -> float:
        """Their sum."""
        return float(sum(self.parts().values()))

    def parts(self) -> dict[str, float]:
        """Bytes by component."""
        return {f.name: float(getattr(self, f.name)) for f in fields(self)}


def in_flight(layout: Layout, stage: int) -> float:
    """Micro-batches' worth of a whole stage's activations that a rank holds at once.

    1F1B: as many as there are stages from this one on. Interleaved, a rank holds chunks of
    1/vpp of a stage, of which the warm-up runs 2 per later stage and pp per further chunk.
    """
    behind = layout.pp - stage
    if layout.vpp == 1:
        return min(behind, layout.micro_batches)
    chunks = 2 * (behind - 1) + (layout.vpp - 1) * layout.pp + 1
    return min(chunks, layout.micro_batches * layout.vpp) / layout.vpp


def stage_memory(
    model: Model,
    layout: Layout,
    constants: Constants,
    stage: int,
    kernels: Kernels | None = None,
) -> Memory:
    """Bytes of one rank of a pipeline stage, counted from 0.

    kernels: what layers are made of; None for Megatron's on a GPU, or the study's plain ones.
    """
    weights = stage_weights(model, layout, stage)
    replicas, expert_replicas = layout.replicas, layout.replicas / layout.ep
    zero = layout.zero

    def held(each: float, sharded: bool) -> float:
        if not sharded:
            return each * weights.total
        return each * (weights.dense / replicas + weights.experts / expert_replicas)

    gathered = gathered_tokens(model, layout, kernels)
    if zero >= 3:  # two layers' weights are whole at a time
        gathered += 2 * layout.element * layer_weights(model, layout).total
    if zero >= 2:
        gathered += 2 * layout.gradient_bytes * layer_weights(model, layout).total
    layers = layout.stage_layers(model.layers)[stage]
    flight = in_flight(layout, stage)
    if stage < layout.pp - 1:
        flight += constants.flight_slack
    kept = kept_per_layer(model, layout, constants, kernels) * layers * flight
    moment = layer_moment(model, layout, constants, kernels)
    if stage == layout.pp - 1:
        moment = max(moment, loss_moment(model, layout, constants, kernels))
    return Memory(
        weights=held(layout.element, zero >= 3),
        gradients=held(layout.gradient_bytes, zero >= 2),
        optimizer=held(_OPTIMIZER[layout.element], zero >= 1),
        activations=kept * constants.activation_slack,
        moment=(moment + gathered) * constants.activation_slack,
        context=constants.context_bytes,
    )


def stages(layout: Layout) -> tuple[int, ...]:
    """First, middle and last stage: the ones that can be the fullest."""
    return tuple(sorted({0, layout.pp // 2, layout.pp - 1}))
