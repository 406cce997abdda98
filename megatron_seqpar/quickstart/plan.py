# SPDX-License-Identifier: Apache-2.0
"""The runs that the quickstart compares, each as arguments of `megatron-seqpar run`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_seqpar.experiments.training import Training, flags
from megatron_seqpar.mfu import read_flags
from megatron_seqpar.quickstart.machine import Machine

FUSED_KERNELS = {"cpu": "cpu", "cuda": "aten"}
"""Device: a fused attention kernel that torch brings, given to the axis and to baselines alike."""


@dataclass(frozen=True)
class Run:
    """One training run. `name` is its folder, `label` and `attention` its row in the table."""

    name: str
    label: str
    attention: str
    ranks: int
    arguments: tuple[str, ...]


def model_arguments(path: Path) -> list[str]:
    """A model file as Megatron's arguments."""
    return flags(read_flags(path))


def plan(training: Training, machine: Machine, *, schedule: str = "auto") -> list[Run]:
    """The runs: the axis, one rank without it, and tensor parallelism, on one attention kernel.

    Tensor parallelism is also run with stock attention. Without Transformer Engine that is
    unfused: slow, and it holds an s x s matrix a head, so it alone would be no fair comparison.
    The run with one rank is what the others' losses are compared with.
    """
    shared = [*training.arguments(), *machine.arguments()]
    size = machine.ranks
    fused = FUSED_KERNELS[machine.device]
    kernel = ["--seqpar-kernel", fused]
    ours = f"fused ({fused})"
    stock = "stock, Transformer Engine" if machine.has_transformer_engine else "stock, unfused"
    runs = []
    if size > 1:
        axis = ["--sequence-parallel-size", str(size), "--seqpar-schedule", schedule, *kernel]
        runs.append(Run(f"sp{size}", f"SP={size}", ours, size, (*shared, *axis)))
    runs.append(Run("sp1", "SP=1", ours, 1, (*shared, *kernel)))
    if size > 1 and divides_heads(training.model, size):
        tensor = ["--tensor-model-parallel-size", str(size), "--sequence-parallel"]
        label = f"TP={size}, same kernel"
        runs.append(Run(f"tp{size}-kernel", label, ours, size, (*shared, *tensor, *kernel)))
        runs.append(Run(f"tp{size}", f"TP={size}, stock", stock, size, (*shared, *tensor)))
    return runs


def divides_heads(model: Path, size: int) -> bool:
    """Whether tensor parallelism of `size` can share out the model's query and KV heads."""
    heads, kv_heads = _heads(model)
    return heads % size == 0 and kv_heads % size == 0


def left_out(model: Path, size: int) -> str | None:
    """Why there is no run with tensor parallelism, or None where there is one."""
    if size == 1 or divides_heads(model, size):
        return None
    heads, kv_heads = _heads(model)
    return (
        f"no run with TP={size}: tensor parallelism cannot share out {heads} query heads and "
        f"{kv_heads} KV heads over {size} ranks"
    )


def _heads(model: Path) -> tuple[int, int]:
    values = read_flags(model)
    heads = int(values.get("num-attention-heads", 1))
    return heads, int(values.get("num-query-groups", heads))
