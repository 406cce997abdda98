# SPDX-License-Identifier: Apache-2.0
"""`torch.cuda` answers as one healthy device per process; `torch.accelerator` tells the truth."""

from __future__ import annotations

import functools
import os
import types
from typing import Any

import torch

from .registry import replace, unit

DEVICE_NAME = "CPU (megatron_seqpar cpu_runtime)"
CAPABILITY = (8, 0)
"""Below Hopper, so that no FP8 or Blackwell path of Megatron is taken."""


def physical_memory() -> int:
    """Bytes of memory in this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _device_properties(device: Any = None) -> types.SimpleNamespace:
    return types.SimpleNamespace(
        name=DEVICE_NAME,
        major=CAPABILITY[0],
        minor=CAPABILITY[1],
        total_memory=physical_memory(),
        multi_processor_count=os.cpu_count() or 1,
        warp_size=32,
        max_threads_per_multi_processor=2048,
        regs_per_multiprocessor=65536,
        shared_memory_per_multiprocessor=164 << 10,
        shared_memory_per_block=48 << 10,
        shared_memory_per_block_optin=163 << 10,
        L2_cache_size=40 << 20,
        is_integrated=True,
        is_multi_gpu_board=False,
        gcnArchName="",
        uuid="00000000-0000-0000-0000-000000000000",
    )


class OneDevice:
    """`torch.cuda.device(i)` and `device_of(t)`: nothing to switch."""

    def __init__(self, device: Any = None) -> None:
        self.idx = 0

    def __enter__(self) -> OneDevice:
        return self

    def __exit__(self, *exception: Any) -> None:
        """Nothing was switched."""


@unit
def cuda_presence() -> None:
    """Megatron refuses to start without CUDA and asks for device counts, ids and properties.

    Each process is told that it has the device of its local rank, out of as many as there are
    processes on the machine. The CUDA build of torch without a driver raises on these calls.

    Serves: training/initialize.py (`assert torch.cuda.is_available()`, `device_count`,
    `set_device`), core/tensor_parallel/random.py (`_lazy_call`), core/timers.py (`synchronize`),
    and about 200 calls of `torch.cuda.current_device`.
    """
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    replace(
        torch.cuda,
        is_available=lambda: True,
        device_count=lambda: local_world_size,
        current_device=lambda: local_rank,
        set_device=_nothing,
        is_initialized=lambda: True,
        init=_nothing,
        _lazy_init=_nothing,
        _lazy_call=lambda callback, **kwargs: callback(),
        _is_in_bad_fork=lambda: False,
        _exchange_device=lambda device: 0,
        _maybe_exchange_device=lambda device: 0,
        synchronize=_nothing,
        ipc_collect=_nothing,
        get_device_name=lambda device=None: DEVICE_NAME,
        get_device_properties=_device_properties,
        get_device_capability=lambda device=None: CAPABILITY,
        is_bf16_supported=lambda *args, **kwargs: True,
        can_device_access_peer=lambda device, peer: True,
        get_arch_list=lambda: [f"sm_{CAPABILITY[0]}{CAPABILITY[1]}"],
        is_current_stream_capturing=lambda: False,
        device=OneDevice,
        device_of=OneDevice,
        check_error=_nothing,
        cudart=lambda: types.SimpleNamespace(cudaProfilerStart=_nothing, cudaProfilerStop=_nothing),
    )


@unit
def no_accelerator() -> None:
    """torch.accelerator asks the build ('made for CUDA') and torch.cuda: it would find a GPU.

    torch's own users of it (DataLoader's pinning thread, activation checkpointing, distributed
    checkpoints) would then call the driver. They get the truth: there is none.

    Serves: training/initialize.py and training/training.py (`torch.accelerator.is_available`),
    torch/utils/data/dataloader.py, torch/utils/checkpoint.py.
    """
    replace(
        torch.accelerator,
        is_available=lambda: False,
        device_count=lambda: 0,
        current_accelerator=lambda check_available=False: None,
    )


@unit
def nvtx_ranges() -> None:
    """Profiler ranges go nowhere: a torch built without CUDA raises on them.

    Serves: core/utils.py (`nvtx_range_push` and `nvtx_range_pop`), training/training.py with
    --profile.
    """
    replace(
        torch.cuda.nvtx,
        range_push=lambda *args, **kwargs: 0,
        range_pop=lambda *args, **kwargs: 0,
        range_start=lambda *args, **kwargs: 0,
        range_end=_nothing,
        mark=_nothing,
    )


@unit
def power_readings() -> None:
    """There is no GPU to read power, temperature or load from: 0 each, without the NVML library.

    Serves: core/utils.py (`StragglerDetector`, with --log-straggler).
    """
    reading = functools.partial(int, 0)
    names = ("temperature", "power_draw", "utilization", "clock_rate")
    replace(torch.cuda, **{name: (lambda device=None: reading()) for name in names})
