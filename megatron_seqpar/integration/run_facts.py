# SPDX-License-Identifier: Apache-2.0
"""What a run is: versions, device, parallel layout, sizes. Read from Megatron while it trains."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from megatron.core import package_info, parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.training import get_args

import megatron_seqpar
from megatron_seqpar import cpu_runtime

UNTIMED_STEPS = 1  # the first step allocates, connects and warms caches


def facts(world: int) -> dict[str, Any]:
    """The parts of a report that say what ran on `world` ranks, as plain values."""
    args = get_args()
    return {
        "versions": _versions(),
        "device": {
            "kind": "cpu" if cpu_runtime.is_active() else "cuda",
            "name": device_name(),
            "backend": torch.distributed.get_backend(),
            "backend_version": _backend_version(),
            "threads": torch.get_num_threads(),
        },
        "parallel": {
            "world": world,
            "sequence": getattr(args, "sequence_parallel_size", 1),
            "tensor": parallel_state.get_tensor_model_parallel_world_size(),
            "tensor_sequence": bool(args.sequence_parallel),
            "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
            "data": parallel_state.get_data_parallel_world_size(),
        },
        "model": {
            "layers": args.num_layers,
            "hidden": args.hidden_size,
            "query_heads": args.num_attention_heads,
            "kv_heads": args.num_query_groups or args.num_attention_heads,
            "sequence_length": args.seq_length,
            "dtype": dtype_name(),
        },
        "plugin": {
            name: value for name, value in sorted(vars(args).items()) if name.startswith("seqpar_")
        },
        "command": sys.argv,
    }


def device_name() -> str:
    """The GPU's name; of a CPU, its architecture and the machine's cores."""
    if cpu_runtime.is_active():
        return f"CPU {platform.machine()}, {os.cpu_count()} cores"
    return torch.cuda.get_device_name()


def _backend_version() -> str:
    """NCCL's version; gloo has none of its own and comes with torch."""
    if torch.distributed.get_backend() == "nccl":
        return "NCCL " + ".".join(map(str, torch.cuda.nccl.version()))
    return f"torch {torch.__version__}"


def dtype_name() -> str:
    """The dtype of the run's weights, as torch calls it without its prefix."""
    return str(get_args().params_dtype).removeprefix("torch.")


def tokens_per_step() -> int:
    """Tokens of the global batch that the running step trains on; 0 where there are no tokens."""
    args = get_args()
    sequences = get_num_microbatches() * args.micro_batch_size * args.data_parallel_size
    return int(sequences * (args.seq_length or 0))


class Rates(NamedTuple):
    """Of the timed steps: how many, median seconds, tokens a second, mean tokens a step."""

    steps: int
    seconds: float | None
    tokens_per_second: float | None
    tokens: float | None


def rates(seconds: Sequence[float], tokens: Sequence[int]) -> Rates:
    """Speed of steps with these times and tokens; all None of no step.

    Tokens a second are those of the median step, and those of all steps together where a growing
    batch makes steps differ; None of a model that has no tokens.
    """
    if not seconds:
        return Rates(0, None, None, None)
    median, mean = statistics.median(seconds), statistics.fmean(tokens)
    if not mean:
        return Rates(len(seconds), median, None, None)
    same = min(tokens) == max(tokens)
    speed = tokens[0] / median if same else sum(tokens) / sum(seconds)
    return Rates(len(seconds), median, speed, mean)


def _versions() -> dict[str, str]:
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "megatron-core": package_info.__version__.split("+")[0],  # less the commit of the folder
        "megatron_seqpar": megatron_seqpar.__version__,
    }
    for name in ("transformer-engine", "flash-attn"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
