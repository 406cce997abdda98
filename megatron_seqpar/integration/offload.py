# SPDX-License-Identifier: Apache-2.0
"""`--seqpar-offload stash`: what a repeated layer keeps waits for backward in host memory.

`memory/offload.py` moves it. Here is the one stash of this process, made when the first layer on a
GPU asks for it, and the micro-batches that it is told of. Megatron's offloading of the optimizer
(`--optimizer-cpu-offload`) shares nothing with it: that moves parameters, gradients and optimizer
state between steps, on streams and in host memory of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megatron_seqpar.config import as_typed
from megatron_seqpar.integration import state
from megatron_seqpar.memory.offload import CudaLanes, Parcel, Stash

_stash: Stash | None = None
_told = False


def current() -> Stash | None:
    """The stash of this process, None before it holds something."""
    return _stash


def reset() -> None:
    """Forget the stash, its counts and that anything was said."""
    global _stash, _told
    _stash, _told = None, False


def parcel_for(hidden: torch.Tensor) -> Parcel | None:
    """Where a layer that runs on `hidden` puts what it keeps; None: nowhere, it stays.

    On a CPU run there is nothing to move, and global rank 0 says so once.
    """
    global _stash
    if state.config().offload == "none":
        return None
    if hidden.device.type == "cpu":
        _tell_once()
        return None
    if _stash is None or _stash.device != hidden.device:
        _stash = Stash(hidden.device, CudaLanes(hidden.device))
    return _stash.parcel()


def _tell_once() -> None:
    global _told
    if _told:
        return
    _told = True
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(
            f"seqpar: {as_typed(state.config(), 'offload')} moves nothing: this run computes on "
            "the CPU, and all that layers keep is in host memory already",
            flush=True,
        )


def counts() -> dict[str, int]:
    """Bytes moved out and back since the start, and the host memory it takes."""
    if _stash is None:
        return {"bytes_out": 0, "bytes_in": 0, "host_bytes": 0}
    pool = _stash.pool
    return {
        "bytes_out": _stash.bytes_out,
        "bytes_in": _stash.bytes_in,
        "host_bytes": pool.in_use + pool.idle,
    }


def around_forward_step(original: Callable[..., Any]) -> Callable[..., Any]:
    """Around Megatron's `forward_step`: each is one micro-batch through one model chunk."""

    @functools.wraps(original)
    def forward_step(*args: Any, **kwargs: Any) -> Any:
        if _stash is not None:
            _stash.begin_group()
        return original(*args, **kwargs)

    return forward_step
