# SPDX-License-Identifier: Apache-2.0
"""Which GPUs are there, and what joins them?"""

from __future__ import annotations

from ..finding import Asked, Finding, Status
from ..machine import Machine
from ..tested import pip_install


def check(asked: Asked, machine: Machine) -> Finding:
    """NVML's matrix of links."""
    topology = machine.topology
    if not topology.models:
        if machine.gpus:
            return Finding(
                "gpus",
                Status.WARNING,
                f"torch sees {machine.gpus} GPUs, but not what joins them: {topology.why_none}",
                fix=pip_install("megatron_seqpar[gpu]"),
            )
        return Finding("gpus", Status.ABSENT, f"no GPU to run on ({topology.why_none})")
    count = len(topology.models)
    kinds = dict.fromkeys(topology.models)
    joined = topology.joined_by
    text = f"{count} x {', '.join(kinds)}" + (f", joined by {joined.value}" if joined else "")
    names = [f"GPU{index}" for index in range(count)]
    width = max(len(kind.value) for row in topology.links for kind in row)
    width = max(width, len(names[-1]))
    head = " " * len(names[-1]) + "".join(f"  {name:>{width}}" for name in names)
    rows = (
        f"{name:<{len(names[-1])}}" + "".join(f"  {kind.value:>{width}}" for kind in row)
        for name, row in zip(names, topology.links, strict=True)
    )
    data = {
        "models": list(topology.models),
        "links": [[kind.value for kind in row] for row in topology.links],
    }
    status, fix = Status.OK, None
    if len(kinds) > 1:
        status, fix = Status.WARNING, "export CUDA_VISIBLE_DEVICES= with GPUs of one kind"
        text += "; every step waits for the slowest kind"
    return Finding("gpus", status, text, fix, (head, *rows), data)
