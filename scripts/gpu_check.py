# SPDX-License-Identifier: Apache-2.0
"""Check and time every attention kernel that this machine's GPU has; needs torch, not Megatron.

    python scripts/gpu_check.py                          # all kernels found, one GPU
    python scripts/gpu_check.py --kernels flash3,cudnn --tokens 32768 --json result.json

For every kernel: its error against fp64 attention as a multiple of the error that plain attention
in the same dtype makes (2 is the limit), its speed forward and backward, and the same for the
distributed attention over 2 to 8 emulated ranks (threads that share the GPU and its default
stream; their sum of work is that of one rank, so what they add in time is the cost of splitting,
merging and copying). Ends with status 1 if a kernel is wrong, 2 if there is nothing to check.
`--device cpu` tries the script itself out on the CPU kernel.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_seqpar.attention import ThreadTransport, build_schedule, dist_flash_attention
from megatron_seqpar.attention.ir import Direction
from megatron_seqpar.attention.kernels import KERNELS, Kernel, TileCall, select
from megatron_seqpar.attention.kernels.reference import ReferenceAttention
from megatron_seqpar.errors import SeqParError

LIMIT = 2.0
FIELDS = ("out", "lse", "dq", "dk", "dv")
Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Sizes:
    """What is computed: one sample of `tokens` tokens."""

    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    def inputs(self, seed: int = 0) -> Tensors:
        """q, k, v, dout; `[1, tokens, heads, head_dim]`."""
        torch.manual_seed(seed)
        return tuple(
            torch.randn(1, self.tokens, heads, self.head_dim, dtype=self.dtype, device=self.device)
            for heads in (self.heads, self.kv_heads, self.kv_heads, self.heads)
        )

    @property
    def call(self) -> TileCall:
        """The causal tile of the whole sequence."""
        return TileCall(self.head_dim**-0.5, high=0)

    @property
    def forward_flops(self) -> float:
        """Two products over the pairs of the causal triangle; backward makes five."""
        return 4.0 * self.heads * self.head_dim * self.tokens * (self.tokens + 1) / 2


# ---- correctness ----------------------------------------------------------------------------


def both_passes(kernel: Kernel, data: Tensors, call: TileCall) -> Tensors:
    """out, lse, dq, dk, dv of one tile."""
    q, k, v, dout = data
    out, lse = kernel.forward(q, k, v, call)
    return out, lse, *kernel.backward(dout, q, k, v, out, lse, call)


def plain_attention(data: Tensors, scale: float) -> Tensors:
    """Causal attention by the book in the inputs' dtype, gradients by autograd."""
    q, k, v = leaves = [t.detach().clone().requires_grad_() for t in data[:3]]
    group = q.shape[2] // k.shape[2]
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(group, 2)) * scale
    above = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    scores = scores.masked_fill(above, float("-inf"))
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.repeat_interleave(group, 2))
    grads = torch.autograd.grad(out, leaves, data[3])
    return out.detach(), scores.logsumexp(-1).detach(), *grads


def rms(tensor: torch.Tensor) -> float:
    """Root of the mean square."""
    return tensor.square().mean().sqrt().item()


def error_ratios(got: Tensors, data: Tensors, call: TileCall) -> dict[str, float]:
    """Our rms error against fp64 over that of plain attention, for every result."""
    truth = both_passes(ReferenceAttention(), tuple(t.double() for t in data), call)
    baseline = plain_attention(data, call.scale)
    ratios = {}
    for name, ours, theirs, exact in zip(FIELDS, got, baseline, truth, strict=True):
        error, allowed = (
            (t.double() - exact).square().mean().sqrt().item() for t in (ours, theirs)
        )
        ratios[name] = error / max(allowed, 1e-7)
    return ratios


# ---- emulated ranks -------------------------------------------------------------------------


def over_ranks(ranks: int, data: Tensors, schedule: str, kernel: str) -> tuple[Tensors, list[int]]:
    """(out, lse, dq, dk, dv of the whole sequence, bytes that each rank sent)."""
    per_rank = data[0].shape[1] // ranks

    def work(transport: ThreadTransport) -> tuple[Tensors, int]:
        at = slice(per_rank * transport.rank, per_rank * (transport.rank + 1))
        q, k, v = leaves = [t[:, at].detach().requires_grad_() for t in data[:3]]
        result = dist_flash_attention(
            q, k, v, group=transport, schedule=schedule, kernel=kernel, return_lse=True
        )
        assert isinstance(result, tuple)
        out, lse = result
        grads = torch.autograd.grad(out, leaves, data[3][:, at])
        return (out.detach(), lse, *grads), transport.counters.bytes

    parts = ThreadTransport.run(ranks, work)
    whole = tuple(
        torch.cat(fields, dim=2 if name == "lse" else 1)
        for name, fields in zip(FIELDS, zip(*(part for part, _ in parts), strict=True), strict=True)
    )
    return whole, [sent for _, sent in parts]


def planned_bytes(ranks: int, sizes: Sizes, schedule: str) -> list[int]:
    """What the schedule says that each rank sends, both passes together."""
    plan = build_schedule(
        schedule, size=ranks, seq_length=sizes.tokens // ranks * ranks, query_heads=sizes.heads,
        kv_heads=sizes.kv_heads, head_dim=sizes.head_dim,
    )  # fmt: skip
    passes: tuple[Direction, ...] = ("forward", "backward")
    return [sum(plan.bytes_sent(r, d, sizes.dtype) for d in passes) for r in range(ranks)]


# ---- speed ----------------------------------------------------------------------------------


def seconds(run: Callable[[], Any], device: torch.device, repeats: int = 5) -> float:
    """Shortest time of one call, after one to warm up."""
    best = float("inf")
    for index in range(repeats + 1):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if index:
            best = min(best, time.perf_counter() - start)
    return best


def speeds(kernel: Kernel, sizes: Sizes) -> tuple[float, float]:
    """(forward, backward) in TFLOP/s."""
    q, k, v, dout = sizes.inputs()
    out, lse = kernel.forward(q, k, v, sizes.call)
    forward = seconds(lambda: kernel.forward(q, k, v, sizes.call), sizes.device)
    backward = seconds(lambda: kernel.backward(dout, q, k, v, out, lse, sizes.call), sizes.device)
    return sizes.forward_flops / forward / 1e12, 2.5 * sizes.forward_flops / backward / 1e12


# ---- all of it ------------------------------------------------------------------------------


@dataclass
class Result:
    """What was found of one kernel; or why it was not checked (`missing`), or how it broke."""

    kernel: str
    missing: str | None = None
    failed: str | None = None
    worst_ratio: float = 0.0
    forward_tflops: float = 0.0
    backward_tflops: float = 0.0
    ranks: dict[str, dict[str, float | bool]] | None = None

    @property
    def right(self) -> bool:
        """Within the limit, alone and over ranks, with the bytes that were planned."""
        entries = (self.ranks or {}).values()
        return (
            self.failed is None
            and self.worst_ratio <= LIMIT
            and all(
                entry["worst_ratio"] <= LIMIT and entry["bytes_as_planned"] for entry in entries
            )
        )


def check(name: str, small: Sizes, large: Sizes, ranks: list[int], schedule: str) -> Result:
    """Check one kernel at small sizes (fp64 truth is large) and time it at large ones."""
    try:
        _, kernel = select(name, device=small.device, dtype=small.dtype, head_dim=small.head_dim)
    except SeqParError as reason:
        return Result(name, missing=str(reason))
    result = Result(name, ranks={})
    try:
        _measure(result, kernel, small, large, ranks, schedule)
    except RuntimeError as failure:  # what a GPU kernel raises; the other kernels still get a turn
        result.failed = str(failure).splitlines()[0]
    return result


def _measure(
    result: Result, kernel: Kernel, small: Sizes, large: Sizes, ranks: list[int], schedule: str
) -> None:
    data, long = small.inputs(), large.inputs()
    ratios = error_ratios(both_passes(kernel, data, small.call), data, small.call)
    result.worst_ratio = max(ratios.values())
    result.forward_tflops, result.backward_tflops = speeds(kernel, large)
    alone = seconds(lambda: both_passes(kernel, long, large.call), large.device, 3)
    assert result.ranks is not None
    for size in ranks:
        even = small.tokens // size * size
        part = tuple(t[:, :even] for t in data)
        got, sent = over_ranks(size, part, schedule, result.kernel)
        run = partial(over_ranks, size, long, schedule, result.kernel)
        result.ranks[str(size)] = {
            "worst_ratio": max(error_ratios(got, part, small.call).values()),
            "bytes_as_planned": sent == planned_bytes(size, small, schedule),
            "time_over_one_rank": seconds(run, large.device, 3) / alone,
        }


def show(result: Result) -> str:
    """Lines for people."""
    if result.missing is not None:
        return f"{result.kernel:10} -      {result.missing}"
    if result.failed is not None:
        return f"{result.kernel:10} FAILED {result.failed}"
    lines = [
        f"{result.kernel:10} {'ok' if result.right else 'WRONG':6} error ratio "
        f"{result.worst_ratio:.2f}, forward {result.forward_tflops:.3g} TFLOP/s, backward "
        f"{result.backward_tflops:.3g} TFLOP/s"
    ]
    lines += [
        f"{'':17} {ranks} ranks: error ratio {entry['worst_ratio']:.2f}, bytes "
        f"{'as planned' if entry['bytes_as_planned'] else 'NOT AS PLANNED'}, "
        f"{entry['time_over_one_rank']:.2f} x the time of one rank"
        for ranks, entry in (result.ranks or {}).items()
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 all right, 1 something wrong, 2 nothing to check."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--tokens", type=int, default=16384, help="for timing")
    parser.add_argument("--check-tokens", type=int, default=1000, help="for correctness")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--schedule", default="balanced")
    parser.add_argument("--ranks", default="2,4,8", help="emulated, with commas; empty for none")
    parser.add_argument("--kernels", default="", help="with commas; default: all for the device")
    parser.add_argument("--json", type=Path, help="write the results in this file")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            "gpu_check: no CUDA device is present, so no GPU kernel can be checked; "
            "--device cpu tries this script on the CPU kernel",
            file=sys.stderr,
        )
        return 2
    device = torch.device(options.device)
    names = options.kernels.split(",") if options.kernels else [
        record.name for record in KERNELS
        if device.type in record.devices and record.name != "reference"
    ]  # fmt: skip
    shape = (options.heads, options.kv_heads, options.head_dim)
    dtype = getattr(torch, options.dtype)
    small = Sizes(options.check_tokens, *shape, dtype, device)
    large = Sizes(options.tokens, *shape, dtype, device)
    ranks = [int(size) for size in options.ranks.split(",") if size]
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"torch {torch.__version__} on {where}; {options.dtype}, {shape[0]}:{shape[1]} heads of "
          f"{shape[2]}; timed at {options.tokens:,} tokens, causal")  # fmt: skip
    results = []
    for name in names:
        results.append(check(name, small, large, ranks, options.schedule))
        print(show(results[-1]), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n")
    checked = [result for result in results if result.missing is None]
    if not checked:
        print("gpu_check: no kernel could be checked", file=sys.stderr)
        return 2
    return 0 if all(result.right for result in checked) else 1


if __name__ == "__main__":
    sys.exit(main())
