# SPDX-License-Identifier: Apache-2.0
"""Can the ranks of this machine talk: NCCL with a GPU each, or gloo?"""

from __future__ import annotations

from ..finding import Asked, Finding, Status
from ..machine import Machine
from ..tested import pinned, pip_install

NAME = "communication"


def check(asked: Asked, machine: Machine) -> Finding:
    """The library that `asked.device` and `asked.nproc` lead to, and whether it is there."""
    facts = machine.stage("torch")
    if "error" in facts:
        return Finding(NAME, Status.ABSENT, "not looked at: it needs torch", "mend torch first")
    libraries = (
        f"gloo: {'there' if facts['gloo'] else 'not in this torch'}",
        f"NCCL: {facts['nccl'] or 'not in this torch'}",
    )
    backend, gpus = machine.backend(asked.device, asked.nproc), machine.gpus
    data = {"backend": backend, "gloo": facts["gloo"], "nccl": facts["nccl"], "gpus": gpus}

    def problem(text: str, fix: str) -> Finding:
        return Finding(NAME, Status.PROBLEM, text, fix, libraries, data)

    if backend == "nccl" and gpus == 0:
        hidden = machine.environ.get("CUDA_VISIBLE_DEVICES")
        if hidden is not None and machine.has_nvidia_device:
            return problem(
                f"NCCL needs GPUs, and CUDA_VISIBLE_DEVICES={hidden} leaves none",
                "unset CUDA_VISIBLE_DEVICES",
            )
        return problem(
            "--device cuda asks for NCCL, which needs a GPU for each process, and there is none",
            "megatron-seqpar run --device cpu ... (gloo), or a machine where nvidia-smi shows GPUs",
        )
    if backend == "nccl" and gpus < asked.nproc:
        return problem(
            f"{asked.nproc} processes and {gpus} GPUs: NCCL wants a GPU for each process",
            f"megatron-seqpar run --nproc {gpus} ...",
        )
    there = facts["nccl"] if backend == "nccl" else facts["gloo"]
    if not there:
        fix = pip_install(pinned("torch"), again=True)
        return problem(f"this torch was built without {backend}", fix)
    name = f"NCCL {facts['nccl']}" if backend == "nccl" else "gloo"
    text = f"{name}, {asked.nproc} processes"
    if backend == "gloo" and gpus:
        text += f" on the CPU (GPUs for NCCL: {gpus})"
    return Finding(NAME, Status.OK, text, details=libraries, data=data)
