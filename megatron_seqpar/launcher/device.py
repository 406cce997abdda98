# SPDX-License-Identifier: Apache-2.0
"""Which device a run uses."""

from __future__ import annotations

import os

from megatron_seqpar.errors import SeqParError

DEVICES = ("auto", "cuda", "cpu")


def resolve_device(device: str) -> str:
    """'cuda' or 'cpu' for 'auto', 'cuda' or 'cpu'. Imports torch.

    Raises SeqParError for another name, for 'cuda' without a GPU and where this machine has fewer
    GPUs than processes.
    """
    if device not in DEVICES:
        raise SeqParError(f"--device {device}: choose one of {', '.join(DEVICES)}")
    if device == "cpu":
        return device
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        if device == "auto":
            return "cpu"
        raise SeqParError(
            "--device cuda: torch finds no GPU (check nvidia-smi, CUDA_VISIBLE_DEVICES and that "
            f"torch {torch.__version__} was built for CUDA); use --device cpu to run without one"
        )
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if processes > count:
        raise SeqParError(
            f"{processes} processes on this machine but {count} GPUs; start at most {count}"
        )
    return "cuda"
