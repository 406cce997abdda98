# SPDX-License-Identifier: Apache-2.0
"""`auto` chunks: how many pieces MLPs and the loss are computed in, chosen when training starts.

By then the model is built, so its parameters are counted and not guessed. Ranks of one
tensor-parallel group communicate in every piece and must cut alike: all ranks reckon with the
smallest budget of any, and what else decides is the same within a pipeline stage.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_seqpar import cpu_runtime
from megatron_seqpar.config import AUTO, SeqParConfig, chunk_count
from megatron_seqpar.integration import plan, state, steps
from megatron_seqpar.memory.choose import GIB, Choice, choose
from megatron_seqpar.memory.sizes import FULL, Activations

ON_DEVICE = 3
"""Layers whose kept activations are on the device with offloading: leaving, coming and at work."""

LEAST_TOKENS = {"cuda": 1024, "cpu": 256}
"""Rows of a piece below which matrix products get slower on such a device."""


def wanted(config: SeqParConfig) -> bool:
    """Whether a setting leaves the choice to this module."""
    return AUTO in (config.mlp_chunks, config.loss_chunks)


def install() -> None:
    """Choose when training starts. A second call changes nothing."""
    steps.around("train", wrap_train)


def wrap_train(original: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron's `train`, after the choice."""

    @functools.wraps(original)
    def train(forward_step_func: Any, model: Any, *rest: Any, **kwargs: Any) -> Any:
        if wanted(state.config()):
            from megatron.training import get_args

            chunks = model if isinstance(model, list) else [model]
            choice = decide(get_args(), state.config(), chunks)
            state.set_chosen(state.ChosenChunks(choice.mlp, choice.loss))
            _tell(choice)
        return original(forward_step_func, model, *rest, **kwargs)

    return train


def decide(args: Any, config: SeqParConfig, model: list[torch.nn.Module]) -> Choice:
    """The choice for this rank; a collective of all ranks.

    args: Megatron's validated arguments. model: this rank's model chunks, wrapped or not.
    """
    device = "cpu" if cpu_runtime.is_active() else "cuda"
    budget = torch.tensor(float(budget_bytes(config)), dtype=torch.float64)
    budget = budget if device == "cpu" else budget.cuda()
    dist.all_reduce(budget, op=dist.ReduceOp.MIN)
    offloads = config.offload != "none" and device == "cuda"
    mlp = chunk_count(config, "mlp_chunks")
    if mlp is None and args.num_experts and not _has_dense_mlps(model):
        mlp = 0  # routed tokens are grouped by expert already
    return choose(
        activations(args, model, ON_DEVICE if offloads else sys.maxsize),
        recompute_of(args, config),
        fixed_bytes=state_bytes(args, (p for part in model for p in part.parameters())),
        budget_bytes=int(budget.item()),
        least_tokens=LEAST_TOKENS[device],
        mlp=mlp,
        loss=chunk_count(config, "loss_chunks"),
    )


def recompute_of(args: Any, config: SeqParConfig) -> str:
    """What is computed again in backward, ours or Megatron's, in the words of `memory.sizes`."""
    if config.recompute == "none" and args.recompute_granularity == FULL:
        return FULL
    return config.recompute


def _has_dense_mlps(model: list[torch.nn.Module]) -> bool:
    from megatron.core.transformer.mlp import MLP
    from megatron.core.transformer.moe.experts import SequentialMLP

    inside = {
        id(module)
        for part in model
        for experts in part.modules()
        if isinstance(experts, SequentialMLP)
        for module in experts.modules()
    }
    modules = (module for part in model for module in part.modules())
    return any(isinstance(module, MLP) and id(module) not in inside for module in modules)


def activations(args: Any, model: list[torch.nn.Module], most: int) -> Activations:
    """This rank's share of the model and of one micro-batch.

    most: layers whose kept activations the device holds at a time.
    """
    from megatron.core.transformer.transformer_layer import TransformerLayer

    heads, tensor_parallel = plan.heads_of(args), args.tensor_model_parallel_size
    gated = bool(_config_of(model[0]).gated_linear_unit)
    down = args.ffn_hidden_size
    if args.num_experts:
        down = max(down, args.moe_router_topk * (args.moe_ffn_hidden_size or down))
    down //= tensor_parallel
    layers = sum(
        isinstance(module, TransformerLayer) for part in model for module in part.modules()
    )
    last = any(hasattr(_unwrapped(part), "output_layer") for part in model)
    return Activations(
        tokens=args.seq_length // args.context_parallel_size * args.micro_batch_size,
        layers=min(layers * in_flight(args) // len(model), most),
        element=torch.empty(0, dtype=args.params_dtype).element_size(),
        hidden=args.hidden_size,
        query=heads["query_heads"] * heads["head_dim"],
        key_value=heads["kv_heads"] * (heads["head_dim"] + heads["value_dim"]),
        heads=heads["query_heads"],
        mlp_up=down * (2 if gated else 1),
        mlp_down=down,
        vocabulary=last * args.padded_vocab_size // tensor_parallel,
        shared=tensor_parallel if args.sequence_parallel else 1,
        predictions=1 + (getattr(args, "mtp_num_layers", None) or 0),
        sums=not args.gradient_accumulation_fusion,
        split_gate=gated and not _config_of(model[0]).bias_activation_fusion,
    )


def in_flight(args: Any) -> int:
    """Forward passes of a model chunk whose backward has not run, at most, on this stage."""
    from megatron.core import parallel_state
    from megatron.core.num_microbatches_calculator import get_num_microbatches

    stages, batches = args.pipeline_model_parallel_size, get_num_microbatches()
    behind = stages - parallel_state.get_pipeline_model_parallel_rank()
    chunks = getattr(args, "virtual_pipeline_model_parallel_size", None) or 1
    if chunks == 1:
        return min(batches, behind)
    return min(batches * chunks, 2 * (behind - 1) + (chunks - 1) * stages + 1)


def state_bytes(args: Any, parameters: Iterable[torch.Tensor]) -> int:
    """Bytes of parameters, gradients and optimizer state on this rank, for Adam or SGD."""
    mixed = args.params_dtype != torch.float32
    in_fp32 = getattr(args, "accumulate_allreduce_grads_in_fp32", False) or not mixed
    optimizer = (4 if mixed else 0) + (8 if args.optimizer == "adam" else 4)
    shards = args.data_parallel_size * args.context_parallel_size
    per_number = optimizer / shards if args.use_distributed_optimizer else optimizer
    if getattr(args, "optimizer_cpu_offload", False):
        per_number *= 1 - args.optimizer_offload_fraction
    per_number += 4 if in_fp32 else 2
    return round(sum(p.numel() * (p.element_size() + per_number) for p in parameters))


def budget_bytes(config: SeqParConfig) -> int:
    """Memory of this rank: what the user says, else its GPU's, else its share of the machine's."""
    if config.memory_budget is not None:
        return round(config.memory_budget * GIB)
    if not cpu_runtime.is_active():
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(machine, _container_limit()) // here


def _container_limit() -> int:
    """What a Linux control group allows this process; no limit elsewhere."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        file = Path("/sys/fs/cgroup") / name
        if file.is_file() and (text := file.read_text().strip()).isdecimal():
            return int(text)
    return 2**63


def _unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    while isinstance(inner := getattr(module, "module", None), torch.nn.Module):
        module = inner
    return module


def _config_of(module: torch.nn.Module) -> Any:
    return _unwrapped(module).config


def _tell(choice: Choice) -> None:
    """One line from the first rank of each pipeline stage."""
    from megatron.core import parallel_state

    first = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )
    if any(first):
        return
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    stage = parallel_state.get_pipeline_model_parallel_rank()
    print(line(choice, stage if stages > 1 else None), flush=True)


def line(choice: Choice, stage: int | None = None) -> str:
    """For people: what was chosen and why. stage: of the pipeline, None without one."""

    def pieces(count: int) -> str:
        return f"in {count} piece{'s' * (count > 1)}" if count else "whole (chunks off)"

    where = "" if stage is None else f" on pipeline stage {stage}"
    text = (
        f"seqpar: auto computes MLPs {pieces(choice.mlp)} and the loss {pieces(choice.loss)}"
        f"{where}: {choice.why}"
    )
    if not choice.fits:
        text += (
            ". This does not fit by the formulas: raise --sequence-parallel-size, or see what "
            "--seqpar-recompute attention-output and --seqpar-offload stash save"
        )
    return text
