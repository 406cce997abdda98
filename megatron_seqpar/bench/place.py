# SPDX-License-Identifier: Apache-2.0
"""Where the ranks of a benchmark run: device, backend, how many, how many a node."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ..errors import SeqParError, UnsupportedError
from ..launcher.device import DEVICES
from ..launcher.environment import under_torchrun


@dataclass(frozen=True)
class Place:
    """Where ranks run.

    Attributes:
        device: cpu or cuda.
        ranks: in all.
        node_size: ranks that share a node, consecutive.
        started: torchrun started the ranks and this process is one of them.
        notes: what is worth telling of the choice.
    """

    device: str
    ranks: int
    node_size: int
    started: bool = False
    notes: tuple[str, ...] = ()

    @property
    def backend(self) -> str:
        """torch.distributed's backend."""
        return "nccl" if self.device == "cuda" else "gloo"


def gpus() -> int:
    """GPUs that this process may use. Imports torch."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def device_of(device: str, ranks: int, option: str = "--ranks") -> str:
    """'cuda' where there are as many GPUs as ranks, 'cpu' else, for `auto`; or what is asked for.

    Raises SeqParError for another name, and for 'cuda' with more ranks than GPUs.
    """
    if device not in DEVICES:
        raise SeqParError(f"--device {device}: choose one of {', '.join(DEVICES)}")
    if device == "cpu":
        return device
    found = gpus()
    if device == "cuda" and found < ranks:
        raise SeqParError(
            f"--device cuda {option} {ranks}: this machine has {found} GPUs, and each rank needs "
            "one; use fewer ranks, or --device cpu"
        )
    return "cuda" if 0 < ranks <= found else "cpu"


def default_ranks(device: str) -> int:
    """Ranks where none are asked for: all GPUs but at most 8, or 2 on a CPU."""
    found = 0 if device == "cpu" else gpus()
    if device == "cuda" and not found:
        device_of(device, 1)
    return min(found, 8) if found else 2


def places(device: str, ranks: tuple[int, ...] | None, node_size: int | None) -> list[Place]:
    """A place for each number of ranks; under torchrun the one that it made.

    Raises SeqParError where numbers of ranks and machine do not fit together.
    """
    if under_torchrun():
        return [_under_torchrun(device, ranks, node_size)]
    found = []
    for count in ranks or (default_ranks(device),):
        chosen = device_of(device, count)
        notes = []
        if device == "auto" and chosen == "cpu" and gpus():
            notes.append(
                f"{gpus()} GPUs for {count} ranks, and each needs one: measuring on the CPU"
            )
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
        if chosen == "cpu" and cores is not None and count > cores:
            notes.append(f"{count} ranks share {cores} cores: what one leaves idle another uses")
        found.append(Place(chosen, count, _node_size(node_size, count), False, tuple(notes)))
    return found


def _under_torchrun(device: str, ranks: tuple[int, ...] | None, node_size: int | None) -> Place:
    world = int(os.environ["WORLD_SIZE"])
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if ranks not in (None, (world,)):
        asked = ",".join(map(str, ranks or ()))
        raise UnsupportedError(
            f"--ranks {asked}: torchrun started {world} ranks, and those are measured; leave "
            "--ranks out"
        )
    chosen = device_of(device, local, "--nproc-per-node")
    return Place(chosen, world, _node_size(node_size or local, world), started=True)


def _node_size(node_size: int | None, ranks: int) -> int:
    size = ranks if node_size is None else node_size
    if size < 1 or ranks % size:
        raise SeqParError(f"--node-size {size}: it must divide {ranks} ranks")
    return size
