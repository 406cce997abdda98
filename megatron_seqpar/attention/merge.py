# SPDX-License-Identifier: Apache-2.0
"""Sum up partial results: outputs by their log-sum-exp, gradients plainly, in fp32 (fp64: fp64).

Low-precision partials are never added to one another in low precision: errors would grow with the
number of ranks. A single partial that covers the whole range is kept as it came.
"""

from __future__ import annotations

import torch


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are kept in: fp32, or fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Touched:
    """Which parts of an accumulator hold something already: (token range, head range)."""

    def __init__(self) -> None:
        self.parts: list[tuple[slice, slice]] = []

    def add(self, at: slice, heads: slice) -> bool:
        """Note a part; whether nothing of it was noted before."""
        fresh = not any(_meet(at, old) and _meet(heads, of) for old, of in self.parts)
        self.parts.append((at, heads))
        return fresh


def _meet(one: slice, other: slice) -> bool:
    return bool(one.start < other.stop and other.start < one.stop)


class OutputAccumulator:
    """Running attention output over disjoint sets of keys, for one range of queries and heads.

    Shapes: out `[b, s, h, dv]`, lse `[b, h, s]` (natural log, fp32 or fp64). A query that has seen
    no key has lse -inf and output 0.

    Args:
        like: a tensor `[b, any, any, dv]` that says batch, value dim, device and dtype.
        tokens, heads: of the range.
    """

    def __init__(self, like: torch.Tensor, tokens: int, heads: int) -> None:
        self.like, self.tokens, self.heads = like, tokens, heads
        self.out: torch.Tensor | None = None
        self.lse: torch.Tensor | None = None
        self._own = False  # are out and lse ours to change?
        self._touched = _Touched()

    def add(
        self, out: torch.Tensor, lse: torch.Tensor, at: slice, heads: slice | None = None
    ) -> None:
        """Merge a partial output of the queries `at` and the heads `heads` (slices; None: all)."""
        heads = slice(0, self.heads) if heads is None else heads
        fresh = self._touched.add(at, heads)
        if self.out is None and out.shape[1:3] == (self.tokens, self.heads):
            self.out, self.lse = out, lse
            return
        whole_out, whole_lse = self._owned()
        acc_out, acc_lse = whole_out[:, at, heads], whole_lse[:, heads, at]
        if fresh:
            acc_out.copy_(out)
            acc_lse.copy_(lse)
            return
        # share of the new partial in the sum: exp(lse) / (exp(acc) + exp(lse)), without either exp
        share = torch.sigmoid(lse - acc_lse)
        share.nan_to_num_(nan=0.0)  # both -inf: no key seen yet, by neither
        acc_out.lerp_(out.to(acc_out.dtype), share.transpose(1, 2).unsqueeze(-1))
        torch.logaddexp(acc_lse, lse, out=acc_lse)

    def _owned(self) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = accumulate_dtype(self.like.dtype)
        if self.out is None or self.lse is None:
            b, d = self.like.shape[0], self.like.shape[-1]
            self.out = self.like.new_zeros((b, self.tokens, self.heads, d), dtype=dtype)
            self.lse = self.out.new_full((b, self.heads, self.tokens), float("-inf"))
        elif not self._own:
            self.out = self.out.to(dtype, copy=True)
            self.lse = self.lse.clone()
        self._own = True
        return self.out, self.lse

    def add_sink(self, sink: torch.Tensor) -> None:
        """Merge, for every query, a key of score `sink[head]` whose value is zero.

        sink: `[h]`. This is the denominator's extra term of off-by-one and learnable softmax.
        """
        out, lse = self._owned()
        extra = sink.to(lse.dtype)[:, None]
        out.mul_(torch.sigmoid(lse - extra).transpose(1, 2).unsqueeze(-1))
        torch.logaddexp(lse, extra, out=lse)

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(out in the input dtype, lse)."""
        if self.out is None:
            self._owned()
        assert self.out is not None
        assert self.lse is not None
        return self.out.to(self.like.dtype), self.lse


class GradAccumulator:
    """Running sum of partial gradients for one range of tokens and heads.

    Args:
        like: a tensor `[b, any, any, d]` that says batch, dim, device and dtype.
        tokens, heads: of the range.
    """

    def __init__(self, like: torch.Tensor, tokens: int, heads: int) -> None:
        self.like, self.tokens, self.heads = like, tokens, heads
        self.grad: torch.Tensor | None = None
        self._own = False

    def add(self, grad: torch.Tensor, at: slice, heads: slice | None = None) -> None:
        """Add the partial gradient of the tokens `at` and the heads `heads` (None: all)."""
        heads = slice(0, self.heads) if heads is None else heads
        if self.grad is None and grad.shape[1:3] == (self.tokens, self.heads):
            self.grad = grad
            return
        self._owned()[:, at, heads] += grad

    def _owned(self) -> torch.Tensor:
        dtype = accumulate_dtype(self.like.dtype)
        if self.grad is None:
            b, d = self.like.shape[0], self.like.shape[-1]
            self.grad = self.like.new_zeros((b, self.tokens, self.heads, d), dtype=dtype)
        elif not self._own:
            self.grad = self.grad.to(dtype, copy=True)
        self._own = True
        return self.grad

    def result(self) -> torch.Tensor:
        """The sum, in the input dtype; zeros where nothing was added."""
        return (self._owned() if self.grad is None else self.grad).to(self.like.dtype)
