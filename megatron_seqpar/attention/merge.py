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


class OutputAccumulator:
    """Running attention output over disjoint sets of keys, for one range of queries.

    Shapes: out `[b, s, h, dv]`, lse `[b, h, s]` (natural log, fp32 or fp64). A query that has seen
    no key has lse -inf and output 0.
    """

    def __init__(self, tokens: int, dtype: torch.dtype) -> None:
        self.tokens, self.dtype = tokens, dtype
        self.out: torch.Tensor | None = None
        self.lse: torch.Tensor | None = None
        self._own = False  # are out and lse ours to change?

    def add(self, out: torch.Tensor, lse: torch.Tensor, at: slice) -> None:
        """Merge the partial output of the queries `at` (a slice of this range's token dim)."""
        if self.out is None and out.shape[1] == self.tokens:
            self.out, self.lse = out, lse
            return
        whole_out, whole_lse = self._owned(out, lse)
        acc_out, acc_lse = whole_out[:, at], whole_lse[:, :, at]
        # share of the new partial in the sum: exp(lse) / (exp(acc) + exp(lse)), without either exp
        share = torch.sigmoid(lse - acc_lse)
        share.nan_to_num_(nan=0.0)  # both -inf: no key seen yet, by neither
        acc_out.lerp_(out.to(acc_out.dtype), share.transpose(1, 2).unsqueeze(-1))
        torch.logaddexp(acc_lse, lse, out=acc_lse)

    def _owned(self, out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = accumulate_dtype(self.dtype)
        if self.out is None or self.lse is None:
            b, _, h, d = out.shape
            self.out = out.new_zeros((b, self.tokens, h, d), dtype=dtype)
            self.lse = lse.new_full((b, h, self.tokens), float("-inf"))
        elif not self._own:
            self.out = self.out.to(dtype, copy=True)
            self.lse = self.lse.clone()
        self._own = True
        return self.out, self.lse

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(out in the input dtype, lse)."""
        assert self.out is not None, "no tile was computed for this range"
        assert self.lse is not None
        return self.out.to(self.dtype), self.lse


class GradAccumulator:
    """Running sum of partial gradients `[b, s, h, d]` for one range of tokens."""

    def __init__(self, tokens: int, dtype: torch.dtype) -> None:
        self.tokens, self.dtype = tokens, dtype
        self.grad: torch.Tensor | None = None
        self._own = False

    def add(self, grad: torch.Tensor, at: slice) -> None:
        """Add the partial gradient of the tokens `at` (a slice of this range's token dim)."""
        if self.grad is None and grad.shape[1] == self.tokens:
            self.grad = grad
            return
        dtype = accumulate_dtype(self.dtype)
        if self.grad is None:
            b, _, h, d = grad.shape
            self.grad = grad.new_zeros((b, self.tokens, h, d), dtype=dtype)
        elif not self._own:
            self.grad = self.grad.to(dtype, copy=True)
        self._own = True
        self.grad[:, at] += grad

    def result(self) -> torch.Tensor:
        """The sum, in the input dtype."""
        assert self.grad is not None, "no tile was computed for this range"
        return self.grad.to(self.dtype)
