# SPDX-License-Identifier: Apache-2.0
"""What this machine has, and what Megatron needs to be told about it."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass

from megatron_seqpar.errors import SeqParError

FUSED_KERNELS = {"cpu": "cpu", "cuda": "aten"}
"""Device: a fused attention kernel that torch brings, given to the axis and to baselines alike."""


@dataclass(frozen=True)
class Machine:
    """The device to use, its name, how many ranks to start, and anything worth telling."""

    device: str
    name: str
    ranks: int
    notes: tuple[str, ...] = ()

    @property
    def has_transformer_engine(self) -> bool:
        """Whether Megatron can use Transformer Engine's layers here."""
        return self.device == "cuda" and importlib.util.find_spec("transformer_engine") is not None

    def arguments(self) -> list[str]:
        """Megatron's arguments for this device; the launcher itself adds what a CPU needs."""
        if self.device == "cpu":
            return []
        arguments = ["--bf16", "--distributed-backend", "nccl"]
        if self.has_transformer_engine:
            return [*arguments, "--transformer-impl", "transformer_engine"]
        # Without Transformer Engine and apex their fused kernels must be declined by name.
        declined = (
            "--no-gradient-accumulation-fusion",
            "--no-rope-fusion",
            "--no-masked-softmax-fusion",
            "--no-persist-layer-norm",
        )
        return [*arguments, "--transformer-impl", "local", *declined]

    def environment(self) -> dict[str, str]:
        """This process's environment for the runs."""
        environment = dict(os.environ)
        if self.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""  # a lone GPU stays out of a CPU run
            # One thread a rank in every run: more ranks mean more cores, as with GPUs.
            environment.setdefault("OMP_NUM_THREADS", "1")
        return environment


def look(device: str, ranks: int | None) -> Machine:
    """Choose what to run on. `device` is auto, cuda or cpu; `ranks` None chooses 2.

    Raises SeqParError when GPUs are asked for that are not there.
    """
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if device not in ("auto", "cuda", "cpu"):
        raise SeqParError(f"--device {device}: the accepted values are auto, cuda and cpu")
    if ranks is not None and ranks < 1:
        raise SeqParError(f"--nproc {ranks}: at least 1 rank is needed")
    wanted = 2 if ranks is None else ranks
    notes = []
    if device == "cuda" and gpus < (ranks or 1):
        raise SeqParError(f"--device cuda --nproc {wanted}: this machine has {gpus} GPUs")
    if device == "cuda" and gpus < wanted:
        wanted = gpus
        notes.append(
            f"{gpus} GPU: the sequence is not split; --device cpu compares on this machine's cores"
        )
    if device == "cuda" or (device == "auto" and gpus >= wanted):
        return Machine("cuda", torch.cuda.get_device_name(0), wanted, tuple(notes))
    if gpus:
        notes.append(
            f"{gpus} GPU for {wanted} ranks, and each needs its own: running on the CPU instead "
            "(--device cuda --nproc 1 uses the GPU, without splitting the sequence)"
        )
    if cores is not None and wanted > cores:
        notes.append(f"{wanted} ranks share {cores} cores: times say little")
    return Machine("cpu", f"CPU, {cores} cores", wanted, tuple(notes))
