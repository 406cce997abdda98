# SPDX-License-Identifier: Apache-2.0
"""Run a per-token function piece by piece, in forward and in backward.

A function that treats every token for itself, such as an MLP, may see the sequence in pieces.
Forward runs the pieces without recording anything and keeps the input alone; backward runs each
piece again, now recorded, and takes its gradients before it turns to the next. So what the
function makes in between exists for one piece at a time (Mini-Sequence Transformer,
arXiv 2407.15892, section 3.2), and it is computed twice.

Parameters are inputs of one autograd node a call, whatever the number of pieces: hooks on their
gradients, by which data parallelism starts its reductions, fire as often as they would without.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from megatron_seqpar.memory.spans import spans


def never_elsewhere(parameter: torch.Tensor) -> bool:
    """Every gradient is what autograd returns."""
    return False


class GradientSum:
    """The gradients of some tensors, summed over pieces.

    Sums are held in fp32 (fp64 for fp64) and rounded to the tensor's dtype once, at the end: in
    bf16 the error of a sum would otherwise grow with the number of pieces. Holding them costs four
    bytes an element while the pieces of one call run; a single piece is passed on as it is.
    """

    def __init__(
        self,
        tensors: Sequence[torch.Tensor],
        elsewhere: Callable[[torch.Tensor], bool] = never_elsewhere,
    ) -> None:
        """
        tensors: what the gradients belong to.
        elsewhere: asked after each piece's backward, whether that backward added a tensor's
            gradient to a buffer of its own, as fused kernels do. What autograd returned is then
            a stand-in without meaning: it is not summed, and the last one becomes the result, so
            that whoever waits for a gradient is told once.
        """
        self._tensors = tuple(tensors)
        self._elsewhere = elsewhere
        self._sums: list[torch.Tensor | None] = [None] * len(self._tensors)
        self._owned = [False] * len(self._tensors)

    def add(self, gradients: Sequence[torch.Tensor | None]) -> None:
        """Add one piece's gradients, in the order of the tensors; None where there is none."""
        for index, (tensor, gradient) in enumerate(zip(self._tensors, gradients, strict=True)):
            if gradient is None:
                continue
            known = self._sums[index]
            if known is None or self._elsewhere(tensor):
                # Not copied, and so not ours to write to: it may be a view of another gradient.
                self._sums[index] = gradient
            elif self._owned[index]:
                known.add_(gradient)
            else:
                wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
                self._sums[index] = known.to(wide) + gradient
                self._owned[index] = True

    def result(self) -> list[torch.Tensor | None]:
        """The sums in their tensors' dtypes; None for a tensor that no piece depended on."""
        return [
            None if total is None else total.to(tensor.dtype)
            for tensor, total in zip(self._tensors, self._sums, strict=True)
        ]


@dataclass(frozen=True)
class _Plan:
    """What one call of `chunked` was asked for."""

    function: Callable[[torch.Tensor], torch.Tensor]
    parameters: tuple[torch.Tensor, ...]
    count: int
    elsewhere: Callable[[torch.Tensor], bool]
    unread: bool
    device: str
    autocast: torch.dtype | None

    @contextlib.contextmanager
    def as_in_forward(self) -> Iterator[None]:
        """The autocast state of the call, wherever autograd runs backward.

        Without its cache: a weight cast while nothing is recorded would be found again by a
        piece that is, and get no gradient.
        """
        with torch.autocast(
            self.device,
            enabled=self.autocast is not None,
            dtype=self.autocast,
            cache_enabled=False,
        ):
            yield

    def run(self, piece: torch.Tensor) -> torch.Tensor:
        """The function on some rows, which must give as many."""
        with self.as_in_forward():
            out = self.function(piece)
        if out.shape[0] != piece.shape[0]:
            raise ValueError(
                f"{piece.shape[0]} rows in, {out.shape[0]} out: not a per-row function"
            )
        return out


def chunked(
    function: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    parameters: Sequence[torch.Tensor],
    count: int,
    *,
    elsewhere: Callable[[torch.Tensor], bool] = never_elsewhere,
    unread: bool = False,
) -> torch.Tensor:
    """`function(x)` in `count` pieces of x's first dimension.

    function: `[n, ...] -> [n, ...]`, every row for itself; it may use collectives, as long as all
        ranks of them run the same number of pieces. It runs twice a piece, so it must not draw
        random numbers.
    x: `[s, ...]`, of any strides. A length that does not divide gives pieces that differ by one
        row; a length below `count` gives one piece a row.
    parameters: all tensors besides x that function uses and that may want a gradient.
    elsewhere: see `GradientSum`.
    unread: nobody reads the values of the output, only its gradient will come: forward computes
        nothing and returns zeros in x's shape and dtype.

    Returns `[s, ...]` of function's dtype. Raises ValueError when function changes the number of
    rows or draws from the device's default generator, and in backward when an unread output would
    not have had x's shape and dtype.
    """
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    if unread and autocast is not None:
        raise ValueError("under autocast an unread output's dtype is not known")
    plan = _Plan(function, tuple(parameters), count, elsewhere, unread, device, autocast)
    out: torch.Tensor = _Chunked.apply(plan, x, *parameters)
    return out


class _Chunked(torch.autograd.Function):
    """The node behind `chunked`; inputs: x and the parameters."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        ctx.plan = plan
        # The parameters are not saved: function finds them itself, and data parallelism may write
        # them anew in between, which autograd would take for a mistake.
        ctx.save_for_backward(x)
        if plan.unread:
            return torch.zeros(x.shape, dtype=x.dtype, device=x.device)
        before = _random_state(x.device)
        out: torch.Tensor | None = None
        for start, stop in spans(x.shape[0], plan.count):
            piece = plan.run(x[start:stop])
            if out is None:
                out = piece.new_empty((x.shape[0], *piece.shape[1:]))
            out[start:stop] = piece
            del piece
        assert out is not None, "spans of any length has a piece"
        if not torch.equal(before, _random_state(x.device)):
            raise ValueError("the function draws random numbers: run again, it would draw others")
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        plan: _Plan = ctx.plan
        (x,) = ctx.saved_tensors
        _, wants_x, *wants = ctx.needs_input_grad
        wanted = [p for p, needed in zip(plan.parameters, wants, strict=True) if needed]
        sums = GradientSum(wanted, plan.elsewhere)
        grad_x = torch.empty_like(x) if wants_x else None
        for start, stop in spans(x.shape[0], plan.count):
            piece = x[start:stop].detach().requires_grad_(wants_x)
            with torch.enable_grad():
                out = plan.run(piece)
            grad_out = grad[start:stop]
            if out.shape != grad_out.shape or out.dtype != grad_out.dtype:
                raise ValueError(
                    f"the output has shape {tuple(out.shape)} and {out.dtype}, its gradient "
                    f"{tuple(grad_out.shape)} and {grad_out.dtype}"
                )
            inputs = [piece, *wanted] if wants_x else wanted
            found: Sequence[torch.Tensor | None] = [None] * len(inputs)
            if out.requires_grad:
                found = torch.autograd.grad(out, inputs, grad_out, allow_unused=True)
            # Before the next piece runs, nothing of this one may be left.
            del out, piece, grad_out
            if grad_x is not None:
                first, *found = found
                if first is None:
                    grad_x[start:stop] = 0
                else:
                    grad_x[start:stop] = first
                del first
            sums.add(found)
            del found, inputs
        results = iter(sums.result())
        return None, grad_x, *(next(results) if needed else None for needed in wants)


def _random_state(device: torch.device) -> torch.Tensor:
    """The state of the device's default generator, on the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.get_rng_state()
