# SPDX-License-Identifier: Apache-2.0
"""A parallel layout with what goes along (micro-batch, recomputation, pieces), and its flags."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_seqpar.mfu import Model

FULL_RECOMPUTE = (
    *("--recompute-granularity", "full"),
    *("--recompute-method", "uniform"),
    *("--recompute-num-layers", "1"),
)
RECOMPUTE = {
    "none": (),
    "selective": ("--recompute-granularity", "selective"),
    "full": FULL_RECOMPUTE,
    "mlp": ("--seqpar-recompute", "mlp"),
    "attention-qkv": ("--seqpar-recompute", "attention-qkv"),
    "attention-output": ("--seqpar-recompute", "attention-output"),
}
"""Name of a way to recompute: its flags; the first three are Megatron's own."""

ZERO = {
    0: (),
    1: ("--use-distributed-optimizer",),
    2: ("--use-megatron-fsdp", "--data-parallel-sharding-strategy", "optim_grads"),
    3: ("--use-megatron-fsdp", "--data-parallel-sharding-strategy", "optim_grads_params"),
}
"""ZeRO stage: Megatron's flags that shard as it does."""

STOCK = "stock"


@dataclass(frozen=True)
class Layout:
    """How a training run is laid out over `ranks`.

    Attributes:
        ranks: processes in all. What TP, SP, CP and PP leave is DP.
        tp, sp, cp, pp, ep: sizes of the axes; `tp_sp` is Megatron's --sequence-parallel.
        vpp: virtual stages of a pipeline rank (interleaving), 1 for none.
        micro_batch: sequences of a micro-batch.
        zero: ZeRO stage of the optimizer over DP (0 to 3).
        recompute: a key of `RECOMPUTE`.
        mlp_chunks, loss_chunks: `off`, `auto` or a number.
        schedule: of attention over SP.
        kernel: an attention kernel of the plugin, or `stock` for Megatron's own attention.
    """

    ranks: int
    tp: int = 1
    sp: int = 1
    cp: int = 1
    pp: int = 1
    ep: int = 1
    vpp: int = 1
    tp_sp: bool = False
    micro_batch: int = 1
    zero: int = 0
    recompute: str = "none"
    mlp_chunks: str = "off"
    loss_chunks: str = "off"
    schedule: str = "auto"
    kernel: str = STOCK

    @property
    def dp(self) -> int:
        """Data-parallel size; 0 where the axes do not fit the ranks."""
        dp, rest = divmod(self.ranks, self.tp * self.sp * self.cp * self.pp)
        return 0 if rest else dp

    def impossible(self, model: Model, global_batch: int) -> str | None:
        """The constraint that this layout breaks, in words that name it, or None."""
        axes = self.tp * self.sp * self.cp * self.pp
        heads, kv = model.query_heads, model.kv_heads
        if self.dp < 1:
            return f"TP x SP x CP x PP = {axes} does not divide {self.ranks} ranks"
        if heads % self.tp:
            return f"TP {self.tp} does not divide {heads} query heads"
        if kv % self.tp and self.tp % kv:
            return f"TP {self.tp} and {kv} KV heads do not divide one another"
        if model.layers % (self.pp * self.vpp):
            return f"PP x VPP = {self.pp * self.vpp} does not divide {model.layers} layers"
        if self.vpp > 1 and self.pp < 2:
            return f"VPP {self.vpp} needs PP above 1"
        if self.tp_sp and self.tp == 1:
            return "TP-SP needs TP above 1"
        if self.ep > 1 and (not model.experts or model.experts % self.ep):
            return f"EP {self.ep} does not divide {model.experts} experts"
        if global_batch % (self.dp * self.micro_batch):
            return (
                f"DP x micro-batch = {self.dp * self.micro_batch} does not divide a global batch "
                f"of {global_batch}"
            )
        if self.cp > 1 and self.sp > 1:
            return "CP together with SP: a hybrid schedule (--seqpar-schedule) covers both"
        if self.cp > 1 and self.kernel != STOCK:
            return "CP runs on Transformer Engine's attention, not on a kernel of the plugin"
        return None

    def arguments(self) -> list[str]:
        """The launcher's flags of this layout."""
        flags: list[str] = []
        for name, size in (
            ("--tensor-model-parallel-size", self.tp),
            ("--sequence-parallel-size", self.sp),
            ("--context-parallel-size", self.cp),
            ("--pipeline-model-parallel-size", self.pp),
            ("--expert-model-parallel-size", self.ep),
            ("--num-virtual-stages-per-pipeline-rank", self.vpp),
        ):
            if size > 1:
                flags += [name, str(size)]
        if self.tp_sp:
            flags.append("--sequence-parallel")
        flags += ZERO[self.zero]
        flags += RECOMPUTE[self.recompute]
        for name, pieces in (
            ("--seqpar-mlp-chunks", self.mlp_chunks),
            ("--seqpar-loss-chunks", self.loss_chunks),
        ):
            if pieces != "off":
                flags += [name, pieces]
        if self.sp > 1 and self.schedule != "auto":
            flags += ["--seqpar-schedule", self.schedule]
        if self.kernel != STOCK:
            flags += ["--seqpar-kernel", self.kernel]
        return flags

    def label(self) -> str:
        """`TP=2 SP=4 PP=2 DP=1`, with what differs from the default: for tables."""
        words = [
            f"{name}={size}"
            for name, size in (
                ("TP", self.tp),
                ("SP", self.sp),
                ("CP", self.cp),
                ("PP", self.pp),
                ("VPP", self.vpp),
                ("EP", self.ep),
                ("DP", self.dp),
            )
            if size > 1
        ] or ["one rank" if self.ranks == 1 else "DP=1"]
        if self.tp_sp:
            words.append("TP-SP")
        if self.micro_batch > 1:
            words.append(f"micro-batch {self.micro_batch}")
        if self.zero:
            words.append(f"ZeRO-{self.zero}")
        if self.recompute != "none":
            words.append(f"{self.recompute} recompute")
        if self.mlp_chunks != "off":
            words.append(f"MLP chunks {self.mlp_chunks}")
        if self.loss_chunks != "off":
            words.append(f"loss chunks {self.loss_chunks}")
        if self.sp > 1 and self.schedule != "auto":
            words.append(self.schedule)
        return " ".join(words)
