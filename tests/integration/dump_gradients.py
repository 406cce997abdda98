# SPDX-License-Identifier: Apache-2.0
"""Run a pretraining script and write the parameter gradients of its first step.

    megatron-seqpar run --nproc N tests/integration/dump_gradients.py OUT.pt SCRIPT ARGS

Gradients are those Megatron hands to its optimizer: reduced over data-parallel and SP ranks,
before clipping, in fp32. `OUT.pt` holds one dict, parameter name -> whole tensor: shards of
tensor-parallel parameters are put together, layers of pipeline stages carry their global number,
and gradients that the distributed optimizer keeps in pieces are gathered. Two runs with different
parallel layouts can therefore be compared name by name with `compare`.
"""

from __future__ import annotations

import os
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def compare(ours: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> dict[str, float]:
    """Relative difference of every gradient, ||a - b|| / ||b||, by parameter name.

    Raises AssertionError when the two runs do not have the same parameters and shapes.
    """
    assert ours.keys() == reference.keys(), ours.keys() ^ reference.keys()
    out = {}
    for name, expected in reference.items():
        assert ours[name].shape == expected.shape, name
        norm = expected.double().norm().clamp(min=1e-30)
        out[name] = float((ours[name].double() - expected.double()).norm() / norm)
    return out


def install(path: str) -> None:
    """Write the gradients of the first step of the run in this process to `path`."""
    from megatron.training import training

    original = training.finalize_model_grads
    written = False

    def finalize_model_grads(model: list[Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal written
        result = original(model, *args, **kwargs)
        if not written:
            written = True
            _write(model, path)
        return result

    training.finalize_model_grads = finalize_model_grads


def _write(chunks: list[Any], path: str) -> None:
    from megatron.core import parallel_state

    for chunk in chunks:
        _gather_shards(chunk)
    stage: dict[str, torch.Tensor] = {}
    for chunk in chunks:
        numbers = _layer_numbers(chunk)
        for name, parameter in chunk.named_parameters():
            whole = _join_tensor_parallel(name, parameter, parameter.main_grad.float())
            stage[_global_name(name, numbers)] = whole.cpu().clone()
    stages: list[Any] = [None] * parallel_state.get_pipeline_model_parallel_world_size()
    group = parallel_state.get_pipeline_model_parallel_group()
    dist.all_gather_object(stages, stage, group=group)
    if dist.get_rank() == 0:
        merged = {name: grad for part in stages for name, grad in part.items()}
        partial = Path(path).with_suffix(".partial")
        torch.save(merged, partial)
        os.replace(partial, path)


def _gather_shards(chunk: Any) -> None:
    """Make every reduced gradient whole on every rank of a distributed optimizer, in place."""
    if not chunk.ddp_config.use_distributed_optimizer:
        return
    for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
        group = buffer.data_parallel_group
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        for bucket in buffer.buckets:
            shard = bucket.grad_data.view(size, -1)[rank].clone()
            dist.all_gather_into_tensor(bucket.grad_data, shard, group=group)


def _join_tensor_parallel(name: str, parameter: Any, grad: torch.Tensor) -> torch.Tensor:
    from megatron.core import parallel_state

    size = parallel_state.get_tensor_model_parallel_world_size()
    # Megatron splits softmax offsets by head and does not mark them.
    by_head = name.endswith("softmax_offset")
    if size == 1 or not (by_head or getattr(parameter, "tensor_model_parallel", False)):
        return grad
    parts = [torch.empty_like(grad) for _ in range(size)]
    group = parallel_state.get_tensor_model_parallel_group()
    dist.all_gather(parts, grad.contiguous(), group=group)
    if getattr(parameter, "partition_stride", 1) == 2:
        # A gated MLP's first weight: each rank holds a gate half and an up half.
        halves = [part.chunk(2, dim=parameter.partition_dim) for part in parts]
        parts = [half[side] for side in range(2) for half in halves]
    return torch.cat(parts, dim=0 if by_head else parameter.partition_dim)


def _layer_numbers(chunk: Any) -> dict[str, int]:
    """Prefix of each layer -> its 0-based number in the whole model."""
    return {
        name: module.layer_number - 1
        for name, module in chunk.named_modules()
        if re.search(r"layers\.\d+$", name) and hasattr(module, "layer_number")
    }


def _global_name(name: str, numbers: dict[str, int]) -> str:
    for prefix, number in numbers.items():
        if name.startswith(prefix + "."):
            stem = re.sub(r"\d+$", str(number), prefix)
            name = stem + name[len(prefix) :]
            break
    return name.replace("module.", "")


if __name__ == "__main__":
    target, script, *rest = sys.argv[1:]
    install(target)
    sys.argv = [script, *rest]
    sys.path.insert(0, str(Path(script).absolute().parent))
    runpy.run_path(script, run_name="__main__")
