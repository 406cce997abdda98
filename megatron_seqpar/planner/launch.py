# SPDX-License-Identifier: Apache-2.0
"""The command that starts a run with a layout: torchrun, the launcher, Megatron's flags."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from .hardware import Cluster
from .layout import Layout

_FSDP = {2: "optim_grads", 3: "optim_grads_params"}


def layout_flags(layout: Layout) -> list[str]:
    """Flags of Megatron and of this project's launcher for a layout."""
    flags = [
        f"--tensor-model-parallel-size {layout.tp}",
        f"--pipeline-model-parallel-size {layout.pp}",
        f"--seq-length {layout.sequence_length}",
        f"--max-position-embeddings {layout.sequence_length}",
        f"--micro-batch-size {layout.micro_batch}",
        f"--global-batch-size {layout.global_batch}",
    ]
    if layout.element == 2:
        flags.append("--bf16")
    if layout.vpp > 1:
        flags.append(f"--num-virtual-stages-per-pipeline-rank {layout.vpp}")
    if layout.ep > 1:
        flags.append(f"--expert-model-parallel-size {layout.ep}")
    if layout.tp_sp:
        flags.append("--sequence-parallel")
    if layout.sp > 1:
        flags.append(f"--sequence-parallel-size {layout.sp}")
        flags.append(f"--seqpar-schedule {layout.schedule}")
    if layout.zero >= 1:
        flags.append("--use-distributed-optimizer")
    if layout.zero >= 2:
        flags.append(f"--use-megatron-fsdp --data-parallel-sharding-strategy {_FSDP[layout.zero]}")
        flags.append("--ckpt-format fsdp_dtensor")  # the only one that it takes
    if layout.overlap_dp and layout.replicas > 1:
        flags.append("--overlap-grad-reduce")
        if layout.zero >= 1:
            flags.append("--overlap-param-gather")
    if layout.recompute == "full":
        flags.append(
            "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
        )
    elif layout.recompute == "selective":
        flags.append("--recompute-granularity selective")
    elif layout.recompute != "none":
        flags.append(f"--seqpar-recompute {layout.recompute}")
    if layout.mlp_chunks:
        flags.append(f"--seqpar-mlp-chunks {layout.mlp_chunks}")
    if layout.loss_chunks:
        flags.append(f"--seqpar-loss-chunks {layout.loss_chunks}")
    return [part for flag in flags for part in flag.split(" ")]


def model_arguments(flags: Mapping[str, Any]) -> list[str]:
    """A model's flags as arguments; true is a bare flag, false is none."""
    arguments = []
    for name, value in flags.items():
        if value is False or value is None:
            continue
        arguments.append("--" + str(name).replace("_", "-"))
        if value is not True:
            arguments.append(str(value))
    return arguments


def launch_command(layout: Layout, cluster: Cluster, flags: Mapping[str, Any]) -> str:
    """The command for each node; data and training length are the user's to add."""
    nodes = -(-layout.ranks // cluster.node_size)
    each = min(layout.ranks, cluster.node_size)
    start = ["torchrun", f"--nproc-per-node={each}"]
    if nodes > 1:
        start += [f"--nnodes={nodes}", "--rdzv-backend=c10d", "--rdzv-endpoint=HOST:29500"]
    else:
        start.append("--standalone")
    start += ["-m", "megatron_seqpar", "run", "pretrain_gpt.py"]
    command = shlex.join([*start, *model_arguments(flags), *layout_flags(layout)])
    if layout.zero >= 2:  # Megatron FSDP refuses the 1 that the launcher sets for everything else
        command = f"CUDA_DEVICE_MAX_CONNECTIONS=32 {command}"
    return command
