# SPDX-License-Identifier: Apache-2.0
"""Imports what may be broken, and prints one line of JSON a stage. A process of its own.

python -m megatron_seqpar.doctor.probe_child
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any


def _torch() -> dict[str, Any]:
    """torch, its GPUs and its communication libraries."""
    import torch
    import torch.distributed as dist

    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            name = torch.cuda.get_device_name(index)
            gpus.append({"name": name, "capability": f"{major}.{minor}"})
    nccl = dist.is_available() and dist.is_nccl_available()
    return {
        "version": torch.__version__,
        "file": torch.__file__,
        "cuda": torch.version.cuda,
        "gpus": gpus,
        "gloo": dist.is_available() and dist.is_gloo_available(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if nccl else None,
    }


def _kernels() -> dict[str, Any]:
    """Every attention kernel with why it cannot be had, and what auto takes."""
    import torch

    from megatron_seqpar.attention.kernels import registry
    from megatron_seqpar.attention.kernels.base import Wanted
    from megatron_seqpar.errors import KernelError

    calls = [Wanted("cpu", "float32", 128, 128)]
    if torch.cuda.is_available():
        calls.insert(0, Wanted("cuda", "bfloat16", 128, 128))
    backends = []
    for record in registry.KERNELS:
        refusals = {f"{call.device} {call.dtype}": record.refuses(call) for call in calls}
        reason = registry.unavailable(record)
        backends.append({"name": record.name, "unavailable": reason, "refuses": refusals})
    chosen: dict[str, str | None] = {}
    for call in calls:
        dtype = getattr(torch, call.dtype)
        try:
            name, _ = registry.select(
                "auto", device=torch.device(call.device), dtype=dtype, head_dim=call.head_dim
            )
        except KernelError as error:
            name = None
            chosen[f"{call.device} {call.dtype} error"] = str(error)
        chosen[f"{call.device} {call.dtype}"] = name
    return {"backends": backends, "chosen": chosen}


def _megatron() -> dict[str, Any]:
    """megatron-core, and whether the plugin finds all that it replaces."""
    import torch

    from megatron_seqpar import cpu_runtime

    if not torch.cuda.is_available():
        cpu_runtime.activate()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        package_info = importlib.import_module("megatron.core.package_info")
        from megatron_seqpar.launcher.script import install_plugin

        install_plugin()
    ours = [str(w.message) for w in caught if str(w.message).startswith("megatron_seqpar was")]
    try:
        importlib.import_module("megatron.training")
        training = None
    except ImportError as error:
        training = str(error)
    return {
        "version": package_info.__version__.split("+")[0],
        "file": str(package_info.__file__),
        "training_error": training,
        "warnings": ours,
    }


def _stage(name: str, look: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The facts of a stage, or what went wrong; libraries' own words go to stderr."""
    with contextlib.redirect_stdout(sys.stderr):
        try:
            facts = look()
        except Exception as error:
            text = " ".join(str(error).split())
            facts = {"error": f"{type(error).__name__}: {text}"}
            if isinstance(error, ModuleNotFoundError):
                facts["module"] = error.name
    return {"stage": name, **facts}


def main() -> None:
    """Look at one after the other; what comes after a failure has it in its own words."""
    # a library that writes to file descriptor 1 must not get between the lines of JSON
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for name, look in (("torch", _torch), ("kernels", _kernels), ("megatron", _megatron)):
        print(json.dumps(_stage(name, look)), file=answers, flush=True)
    answers.close()
    os._exit(0)  # nothing of what was imported need be torn down


if __name__ == "__main__":
    main()
