# SPDX-License-Identifier: Apache-2.0
"""A parallel layout: how a step's work is cut over ranks and in time, and what forbids it."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UnsupportedError
from ..mfu import Model

RECOMPUTE = ("none", "selective", "mlp", "attention-qkv", "attention-output", "full")
KERNELS = ("flash2", "flash1", "fused", "torch")
SCHEDULES = ("balanced", "zigzag", "ring", "allgather", "ulysses")
"""Schedules of this project that are planned with; `distflashattn` is the published one."""


@dataclass(frozen=True)
class Layout:
    """A parallel layout and the batch that it serves.

    Attributes:
        sequence_length: tokens of a sequence.
        global_batch: sequences of a step.
        tp, sp, pp, dp, ep: ranks of the tensor-, sequence-, pipeline-, data- and expert-parallel
            axes. Experts are spread over sp x dp ranks; ep adds no ranks.
        vpp: virtual pipeline stages of a rank, 1 for none.
        micro_batch: sequences of a micro-batch.
        zero: 0 keeps all; 1 shards optimizer state over data-parallel ranks, 2 gradients too, 3
            weights too. Ranks of the SP axis share in the sharding.
        recompute: what is computed again in backward. `selective` and `full` are Megatron's.
        mlp_chunks, loss_chunks: pieces of the sequence for MLPs and for the loss; 0 for off.
        tp_sp: Megatron's --sequence-parallel.
        schedule: of attention over the SP axis.
        kernel: flash2 (FlashAttention 2 or what the cluster has), flash1, fused (softmax kernel
            that keeps s x s scores) or torch.
        fused_norm: norms are single kernels.
        element: bytes of an activation and a weight: 2 in bfloat16, 4 in fp32.
        gradient_bytes: bytes of a gradient; 4 in Megatron, 2 where they stay bfloat16.
        parallel_loss: logits stay split over tensor-parallel ranks.
        fused_loss: no more than 8 bytes a logit at once; Megatron's cross entropy.
        plain_layers: layers keep what plain torch code keeps, not what Megatron's do: no joint
            product of queries, keys and values, but copies around all-reduces.
        overlap_dp: gradient reduction runs beside backward.
        copied_reduction: it passes through copies as large as the weights, made anew in each step;
            Megatron reduces the buffers that it keeps.
        uneven: stages may differ in layers, which Megatron refuses by default.
    """

    sequence_length: int
    global_batch: int
    tp: int = 1
    sp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1
    vpp: int = 1
    micro_batch: int = 1
    zero: int = 1
    recompute: str = "none"
    mlp_chunks: int = 0
    loss_chunks: int = 0
    tp_sp: bool = False
    schedule: str = "balanced"
    kernel: str = "flash2"
    fused_norm: bool = True
    element: int = 2
    gradient_bytes: int = 4
    parallel_loss: bool = True
    fused_loss: bool = True
    plain_layers: bool = False
    overlap_dp: bool = True
    copied_reduction: bool = False
    uneven: bool = False

    @property
    def ranks(self) -> int:
        """Ranks of the whole run."""
        return self.tp * self.sp * self.pp * self.dp

    @property
    def replicas(self) -> int:
        """Ranks that hold the same weights, over which optimizer state can be sharded."""
        return self.dp * self.sp

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a step on each data-parallel rank."""
        return self.global_batch // (self.dp * self.micro_batch)

    def stage_layers(self, layers: int) -> tuple[int, ...]:
        """Layers of each pipeline stage; where they are uneven, the earlier ones have one more."""
        each, more = divmod(layers, self.pp)
        return tuple(each + (stage < more) for stage in range(self.pp))

    @property
    def tokens(self) -> float:
        """Tokens of a micro-batch on one rank of the SP axis."""
        return self.micro_batch * self.sequence_length / self.sp


def impossible(model: Model, layout: Layout) -> str | None:
    """The constraint that a layout breaks, in words; None when it breaks none."""
    heads, layers = model.query_heads, model.layers
    if heads % layout.tp:
        return f"tp={layout.tp} does not divide {heads} heads"
    if layout.tp > model.kv_heads and layout.tp % model.kv_heads:
        return f"tp={layout.tp} is no multiple of {model.kv_heads} KV heads"
    if layout.tp <= model.kv_heads and model.kv_heads % layout.tp:
        return f"tp={layout.tp} does not divide {model.kv_heads} KV heads"
    if model.ffn % layout.tp:
        return f"tp={layout.tp} does not divide the MLP width {model.ffn}"
    if layers % (layout.pp * layout.vpp) and not layout.uneven:
        return f"pp={layout.pp} x vpp={layout.vpp} does not divide {layers} layers"
    if layout.global_batch % (layout.dp * layout.micro_batch):
        return (
            f"dp={layout.dp} x micro-batch {layout.micro_batch} does not divide the global batch "
            f"of {layout.global_batch} sequences"
        )
    if layout.vpp > 1 and layout.pp < 2:
        return f"vpp={layout.vpp} needs pp >= 2"
    if layout.vpp > 1 and layout.micro_batches % layout.pp:
        return (
            f"vpp={layout.vpp}: pp={layout.pp} does not divide {layout.micro_batches} micro-batches"
        )
    if layout.sequence_length % layout.sp:
        return f"sp={layout.sp} does not divide {layout.sequence_length} tokens"
    if layout.tp_sp and layout.tp > 1 and layout.sequence_length // layout.sp % layout.tp:
        return f"TP-SP: tp={layout.tp} does not divide {layout.sequence_length // layout.sp} tokens"
    if model.experts and layout.tp > 1 and not layout.tp_sp and not layout.plain_layers:
        return f"tp={layout.tp} with experts needs TP-SP"
    if layout.mlp_chunks and model.moe_layers == model.layers:
        return "pieces of MLPs: every layer is a mixture of experts, which are not cut"
    if layout.zero >= 2:
        own = layout.recompute not in ("none", "full", "selective")
        if own or layout.sp > 1 or layout.mlp_chunks or layout.loss_chunks:
            return f"zero={layout.zero} is Megatron FSDP, which goes with no flag of this project"
        if layout.pp > 1:
            return f"zero={layout.zero} is Megatron FSDP, planned here without a pipeline only"
    if layout.ep > 1:
        if not model.experts:
            return f"ep={layout.ep}: the model has no experts"
        if model.experts % layout.ep:
            return f"ep={layout.ep} does not divide {model.experts} experts"
        if layout.replicas % layout.ep:
            return f"ep={layout.ep} does not divide dp x sp = {layout.replicas}"
    return None


def check(model: Model, layout: Layout) -> None:
    """Raise UnsupportedError for a layout that cannot be, with the constraint that it breaks."""
    for name in ("tp", "sp", "pp", "dp", "ep", "vpp", "micro_batch", "global_batch"):
        if getattr(layout, name) < 1:
            raise UnsupportedError(f"layout: {name}={getattr(layout, name)}: use 1 or more")
    for name, known in (
        ("recompute", RECOMPUTE), ("kernel", KERNELS), ("schedule", SCHEDULES), ("zero", range(4))
    ):  # fmt: skip
        value = getattr(layout, name)
        if value not in known:
            accepted = ", ".join(str(each) for each in known)
            raise UnsupportedError(f"layout: {name}={value}: use one of {accepted}")
    reason = impossible(model, layout)
    if reason is not None:
        raise UnsupportedError(f"layout: {reason}")
