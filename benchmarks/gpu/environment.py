# SPDX-License-Identifier: Apache-2.0
"""What is here: versions, the GPU, every kernel backend or why not, and two ceilings."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from benchmarks.gpu.settings import Outcome, Settings
from benchmarks.gpu.timing import clocks, time_calls
from megatron_seqpar.attention.kernels import KERNELS, registry
from megatron_seqpar.bench import result as result_file

PACKAGES = (
    "torch", "triton", "megatron-core", "megatron_seqpar", "flash-attn", "flash_attn_3",
    "flash-attn-4", "transformer-engine", "nvidia-nccl-cu13", "nvidia-cudnn-cu13", "numpy",
)  # fmt: skip


def found_kernels(device: torch.device) -> list[str]:
    """The backends that can be used on a device here, fast ones only."""
    return [
        record.name
        for record in KERNELS
        if device.type in record.devices
        and record.name != "reference"
        and registry.unavailable(record) is None
    ]


def describe(device: torch.device) -> dict[str, Any]:
    """Command, versions and hardware, with the GPU's."""
    found = result_file.describe()
    found["platform"] = platform.platform()
    found["versions"] |= {name: _version(name) for name in PACKAGES}
    found["variables"] = {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(("CUDA_", "NCCL_", "TORCH_NCCL_", "PYTORCH_", "SEQPAR_"))
    }
    found["kernels"] = dict(registry.report())
    if device.type == "cuda":
        found["gpu"] = _gpu(device)
    return found


def _gpu(device: torch.device) -> dict[str, Any]:
    about = torch.cuda.get_device_properties(device)
    return {
        "name": about.name,
        "compute_capability": f"{about.major}.{about.minor}",
        "multiprocessors": about.multi_processor_count,
        "memory_gib": round(about.total_memory / 2**30, 1),
        "l2_mib": round(about.L2_cache_size / 2**20, 1),
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "clocks": clocks(),
    }


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return done.stdout.strip() or None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def ceilings(settings: Settings) -> dict[str, float]:
    """What the device does at best: a matrix product (TFLOP/s), a copy (GB/s read and written)."""
    n = settings.pick(full=8192, quick=8192, tiny=64)
    a, b = (torch.randn(n, n, dtype=settings.half, device=settings.device) for _ in range(2))
    size = settings.pick(full=2**30, quick=2**30, tiny=2**16)
    source = torch.empty(size, dtype=torch.int32, device=settings.device).random_()
    target = torch.empty_like(source)
    seconds = settings.pick(full=0.5, quick=0.2, tiny=0.01)
    product = time_calls(lambda: torch.mm(a, b), settings.device, seconds=seconds)
    copy = time_calls(lambda: target.copy_(source), settings.device, seconds=seconds)
    return {
        "matrix_product_tflops": 2 * n**3 / product.median / 1e9,
        "copy_gb_per_s": 2 * source.nbytes / copy.median / 1e6,
    }


def run(settings: Settings) -> Outcome:
    """Fails only where no kernel is found."""
    found = describe(settings.device)
    kernels = found_kernels(settings.device)
    outcome = Outcome(data={**found, "ceilings": ceilings(settings)})
    if not kernels:
        outcome.failures.append(f"no attention kernel for {settings.device.type} was found")
    outcome.left_out += [f"{name}: {why}" for name, why in found["kernels"].items() if name not in
                         (*kernels, "reference", "cpu")]  # fmt: skip
    where = found["gpu"]["name"] if settings.on_gpu else "CPU"
    limits = outcome.data["ceilings"]
    outcome.says = (
        f"{where}; kernels {', '.join(kernels) or 'none'}; matrix product "
        f"{limits['matrix_product_tflops']:.3g} TFLOP/s, copy {limits['copy_gb_per_s']:.3g} GB/s"
    )
    return outcome
