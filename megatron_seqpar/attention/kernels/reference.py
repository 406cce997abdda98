# SPDX-License-Identifier: Apache-2.0
"""Plain attention in fp64, for truth, and for what no other kernel serves.

Every formula is written out. Rows are taken a block at a time, and of the keys only those that some
row of the block sees, so memory is a block's scores and not sq * skv, and a window costs its width.
Results leave in the input dtype; the LSE is fp32, fp64 for fp64 inputs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..merge import accumulate_dtype
from .base import TileCall

_SCORES = 2**22  # of one block: 32 MiB in fp64
_ROWS = 16  # at least, whatever they take


def unavailable() -> str | None:
    """Always there."""
    return None


class ReferenceAttention:
    """See `base.Kernel`."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: TileCall
    ) -> tuple[torch.Tensor, torch.Tensor]:
        (b, sq, h, _), hkv = q.shape, k.shape[2]
        out = q.new_empty((b, sq, h, v.shape[-1]))
        lse = q.new_empty((b, h, sq), dtype=accumulate_dtype(q.dtype))
        keys, values = k.double(), v.double()
        for rows, cols in _blocks(q, k, call):
            scores, _ = _scores(_grouped(q[:, rows], hkv), keys[:, cols], rows, cols, call)
            sums = torch.logsumexp(scores, dim=-1)
            weights = torch.exp(scores - sums[..., None])
            out[:, rows] = torch.einsum("bngqk,bknd->bqngd", weights, values[:, cols]).flatten(2, 3)
            lse[:, :, rows] = sums.flatten(1, 2)
        return out, lse

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        call: TileCall,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        hkv = k.shape[2]
        dq = q.new_empty(q.shape)
        keys, values = k.double(), v.double()
        dk, dv = torch.zeros_like(keys), torch.zeros_like(values)
        for rows, cols in _blocks(q, k, call):
            queries, grad, results = (_grouped(t[:, rows], hkv) for t in (q, dout, out))
            scores, slope = _scores(queries, keys[:, cols], rows, cols, call)
            sums = lse[:, :, rows].double().unflatten(1, (hkv, -1))
            weights = torch.exp(scores - sums[..., None])
            delta = torch.einsum("bqngd,bqngd->bngq", grad, results)
            dscores = torch.einsum("bqngd,bknd->bngqk", grad, values[:, cols]) - delta[..., None]
            dscores *= weights * slope * call.scale
            dq[:, rows] = torch.einsum("bngqk,bknd->bqngd", dscores, keys[:, cols]).flatten(2, 3)
            dk[:, cols] += torch.einsum("bngqk,bqngd->bknd", dscores, queries)
            dv[:, cols] += torch.einsum("bngqk,bqngd->bknd", weights, grad)
        return dq, dk.to(k.dtype), dv.to(v.dtype)


def _blocks(q: torch.Tensor, k: torch.Tensor, call: TileCall) -> Iterator[tuple[slice, slice]]:
    """Blocks of rows, and the columns that they see."""
    (b, sq, h, _), skv = q.shape, k.shape[1]
    low = 1 - sq if call.low is None else call.low
    high = skv - 1 if call.high is None else call.high
    # a block of as many rows as a window has keys sees at most twice what each row does
    step = min(_SCORES // (b * h * skv), max(high - low, 4 * _ROWS))
    step = max(step, _ROWS)
    for start in range(0, sq, step):
        stop = min(start + step, sq)
        yield slice(start, stop), slice(max(start + low, 0), min(stop + high, skv))


def _grouped(x: torch.Tensor, hkv: int) -> torch.Tensor:
    """`[b, s, h, d]` -> `[b, s, hkv, group, d]`, in fp64."""
    grouped: torch.Tensor = x.double().unflatten(2, (hkv, -1))
    return grouped


def _scores(
    q: torch.Tensor, k: torch.Tensor, rows: slice, cols: slice, call: TileCall
) -> tuple[torch.Tensor, torch.Tensor | float]:
    """Scores `[b, hkv, group, q, k]` of a block, and their slope in what the cap was applied to."""
    scores = torch.einsum("bqngd,bknd->bngqk", q, k) * call.scale
    slope: torch.Tensor | float = 1.0
    if call.softcap:
        tanh = torch.tanh(scores / call.softcap)
        scores, slope = call.softcap * tanh, 1 - tanh.square()
    if call.full:
        return scores, slope
    i = torch.arange(rows.start, rows.stop, device=q.device)[:, None]
    j = torch.arange(cols.start, cols.stop, device=q.device)
    hidden = torch.zeros((), dtype=torch.bool, device=q.device)
    if call.low is not None:
        hidden = hidden | (j - i < call.low)
    if call.high is not None:
        hidden = hidden | (j - i > call.high)
    return scores.masked_fill(hidden, float("-inf")), slope
