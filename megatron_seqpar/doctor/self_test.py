# SPDX-License-Identifier: Apache-2.0
"""One rank of the self-test: distributed attention over the real transport against plain fp64.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=... MASTER_PORT=... \\
        python -m megatron_seqpar.doctor.self_test gloo

Rank 0 prints one line of JSON. Two kinds of comparison, of the output and of all three gradients:

* in fp64, where the schedules must agree with one device to rounding;
* in the dtype of training, where the error against fp64 must be at most twice the error of the same
  kernel on one device.

The truth is written out here with a full matrix of scores and autograd's own gradients.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatron_seqpar.attention import LocalTransport, dist_flash_attention, even_lengths
from megatron_seqpar.attention.kernels import select

TOKENS, HEADS, KV_HEADS, HEAD_DIM = 509, 6, 2, 64  # a prime: chunks are uneven
EXACT = 1e-9
RATIO = 2.0
SCHEDULES = ("balanced", "zigzag", "ring")
GROUP_SECONDS = 60
FIELDS = ("output", "dq", "dk", "dv")


class Inputs(NamedTuple):
    """q `[1, s, h, d]`, k and v `[1, s, hkv, d]`, the output's gradient as q."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor

    def on(self, device: torch.device, dtype: torch.dtype) -> Inputs:
        """The same on a device, rounded to a dtype."""
        return Inputs(*(tensor.to(device, dtype) for tensor in self))

    def tokens(self, first: int, end: int) -> Inputs:
        """Those of some tokens."""
        return Inputs(*(tensor[:, first:end] for tensor in self))


Results = tuple[torch.Tensor, ...]
"""The output and the gradients of q, k and v, as `FIELDS`."""


def inputs() -> Inputs:
    """In fp64 on the CPU, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    sizes = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    return Inputs(
        *(
            torch.randn(1, TOKENS, heads, HEAD_DIM, dtype=torch.float64, generator=generator)
            for heads in sizes
        )
    )


def truth(data: Inputs) -> Results:
    """Causal attention of the whole sequence and its gradients, in fp64 on the CPU."""
    q, k, v = (tensor.detach().cpu().double().requires_grad_() for tensor in data[:3])
    heads_a_key = HEADS // KV_HEADS
    wide = [tensor.repeat_interleave(heads_a_key, dim=2) for tensor in (k, v)]
    scores = torch.einsum("bqhd,bkhd->bhqk", q, wide[0]) * HEAD_DIM**-0.5
    hidden = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    out = torch.einsum("bhqk,bkhd->bqhd", weights, wide[1])
    gradients = torch.autograd.grad(out, (q, k, v), data.dout.cpu().double())
    return (out.detach(), *gradients)


def ours(data: Inputs, **options: Any) -> Results:
    """`dist_flash_attention` of these tokens and its gradients."""
    q, k, v = (tensor.detach().clone().requires_grad_() for tensor in data[:3])
    out = dist_flash_attention(q, k, v, **options)
    assert isinstance(out, torch.Tensor)
    gradients = torch.autograd.grad(out, (q, k, v), data.dout)
    return (out.detach(), *gradients)


def errors(got: Results, true: Results) -> torch.Tensor:
    """Mean absolute error of each field over its mean absolute value, `[4]`."""
    found = []
    for mine, right in zip(got, true, strict=True):
        right = right.to(mine.device)
        found.append((mine.double() - right).abs().mean() / right.abs().mean())
    return torch.stack(found)


def worst(values: torch.Tensor, device: torch.device) -> list[float]:
    """The largest over the ranks, of each entry; NaN where any is."""
    held = values.nan_to_num(nan=float("inf")).to(device)
    dist.all_reduce(held, op=dist.ReduceOp.MAX)
    return [float(value) for value in held]


def compare(backend: str) -> dict[str, Any]:
    """All comparisons; the same on every rank."""
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else None
    device = device or torch.device("cpu")
    dtype = torch.bfloat16 if backend == "nccl" else torch.float32
    lengths = even_lengths(TOKENS, world)
    first = sum(lengths[:rank])
    mine = slice(first, first + lengths[rank])
    data = inputs()
    cases: list[dict[str, Any]] = []

    def case(name: str, what: str, values: list[float], limit: float) -> None:
        fields = dict(zip(FIELDS, values, strict=True))
        told = {"name": name, "what": what, "limit": limit, "fields": fields}
        cases.append({**told, "value": max(values), "right": max(values) <= limit})

    exact = tuple(field[:, mine] for field in truth(data))
    for schedule in SCHEDULES:
        whole = data.on(device, torch.float64)
        kernel = "reference" if backend == "nccl" else "auto"
        got = ours(
            whole.tokens(mine.start, mine.stop), schedule=schedule, lengths=lengths, kernel=kernel
        )
        case(f"{schedule} in float64", "error", worst(errors(got, exact), device), EXACT)
    whole = data.on(device, dtype)
    rounded = tuple(field[:, mine] for field in truth(whole))
    got = ours(whole.tokens(mine.start, mine.stop), schedule="auto", lengths=lengths)
    alone = ours(whole, group=LocalTransport())
    single = tuple(field[:, mine] for field in alone)
    ratio = errors(got, rounded) / errors(single, rounded)
    name = str(dtype).removeprefix("torch.")
    case(f"auto in {name}", "error over that of one device", worst(ratio, device), RATIO)
    kernel, _ = select("auto", device=device, dtype=dtype, head_dim=HEAD_DIM)
    return {"cases": cases, "kernel": kernel, "device": str(device.type), "dtype": name}


def main(backend: str) -> None:
    """Join the others, compare, and say so."""
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend, timeout=timedelta(seconds=GROUP_SECONDS))
    found = compare(backend)
    dist.barrier()
    if dist.get_rank() == 0:
        print(json.dumps(found), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
