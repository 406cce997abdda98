# SPDX-License-Identifier: Apache-2.0
"""Rows of logits in Triton: read once for their statistics, once for their gradient.

A program walks a row of `[n, v]` in blocks, keeping the largest logit so far and the sum of
exponentials relative to it (the online softmax), both fp32 in registers. The gradient needs no such
walk, since the row's log-sum-exp is known: every block of it is computed for itself, in place.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megatron_seqpar.memory.logit_rows import Statistics

_MOST = 8192
"""Logits that a program holds at a time."""

_LEAST = 16


@triton.jit
def _statistics_kernel(
    logits,  # [rows, size]
    labels,  # [rows] int64, relative to the first logit
    maximum,  # [rows] fp32, out
    total,  # [rows] fp32, out
    target,  # [rows] fp32, out
    winner,  # [rows] int64, out, read only if WINNER
    stride,
    size,
    WINNER: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    line = logits + row * stride
    columns = tl.arange(0, BLOCK)
    largest = tl.full((), -float("inf"), tl.float32)
    summed = tl.full((), 0.0, tl.float32)
    first = tl.full((), 0, tl.int64)
    for index in range(BLOCKS):
        start = index * BLOCK
        inside = start + columns < size
        x = tl.load(line + start + columns, mask=inside, other=-float("inf")).to(tl.float32)
        block_largest = tl.max(x, 0)
        if WINNER:
            # Only a larger logit takes over, so of equal ones the first stays.
            at = tl.min(tl.where(x == block_largest, start + columns, size), 0).to(tl.int64)
            first = tl.where(block_largest > largest, at, first)
        new = tl.maximum(largest, block_largest)
        # Relative to 0 while all logits are minus infinity: -inf - -inf is not a number.
        shift = tl.where(new == -float("inf"), 0.0, new)
        summed = summed * tl.exp(largest - shift) + tl.sum(tl.exp(x - shift), 0)
        largest = new
    label = tl.load(labels + row)
    here = (label >= 0) & (label < size)
    own = tl.load(line + label, mask=here, other=0.0).to(tl.float32)
    tl.store(maximum + row, largest)
    tl.store(total + row, summed)
    tl.store(target + row, own)
    if WINNER:
        tl.store(winner + row, first)


@triton.jit
def _gradient_kernel(
    logits,  # [rows, size], overwritten
    labels,  # [rows] int64, relative to the first logit
    lse,  # [rows] fp32
    grad,  # [rows] fp32
    stride,
    size,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    place = logits + row * stride + columns
    x = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    # Compared before the label is narrowed: one far outside must not wrap around into the row.
    onehot = tl.where(columns.to(tl.int64) == tl.load(labels + row), 1.0, 0.0)
    out = (tl.exp(x - tl.load(lse + row)) - onehot) * tl.load(grad + row)
    tl.store(place, out.to(logits.dtype.element_ty), mask=inside)


def _block(size: int) -> int:
    return int(min(_MOST, max(_LEAST, triton.next_power_of_2(size))))


def _warps(block: int) -> int:
    return max(1, min(16, block // 512))


class TritonRows:
    """bf16, fp16 and fp32 logits on a GPU; see `logit_rows.RowKernel`."""

    def statistics(self, logits: torch.Tensor, labels: torch.Tensor, winner: bool) -> Statistics:
        rows, size = logits.shape
        maximum, total, target = torch.empty(
            (3, rows), dtype=torch.float32, device=logits.device
        ).unbind()
        position = torch.empty(rows if winner else 0, dtype=torch.int64, device=logits.device)
        if rows:
            block = _block(size)
            with torch.cuda.device_of(logits):
                _statistics_kernel[(rows,)](
                    logits,
                    labels.contiguous(),
                    maximum,
                    total,
                    target,
                    position,
                    logits.stride(0),
                    size,
                    WINNER=winner,
                    BLOCK=block,
                    BLOCKS=triton.cdiv(size, block),
                    num_warps=_warps(block),
                )
        return Statistics(maximum, total, target, position if winner else None)

    def gradient(
        self, logits: torch.Tensor, labels: torch.Tensor, lse: torch.Tensor, grad: torch.Tensor
    ) -> torch.Tensor:
        rows, size = logits.shape
        if rows:
            block = _block(size)
            with torch.cuda.device_of(logits):
                _gradient_kernel[(rows, triton.cdiv(size, block))](
                    logits,
                    labels.contiguous(),
                    lse.contiguous(),
                    grad.float().contiguous(),
                    logits.stride(0),
                    size,
                    BLOCK=block,
                    num_warps=_warps(block),
                )
        # Autograd cannot see the writes: whoever saved these logits must be told, not misled.
        torch.autograd.graph.increment_version(logits)
        return logits
