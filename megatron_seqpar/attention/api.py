# SPDX-License-Identifier: Apache-2.0
"""`dist_flash_attention`: exact, differentiable attention over a split sequence."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist

from ..errors import UnsupportedError
from . import kernels
from .execute import Execution
from .layouts import even_lengths
from .masks import Causal, Mask
from .schedules import build_schedule
from .transport import Transport, transport_of

TensorLayout = Literal["bshd", "sbhd", "bhsd"]

# tensor layout -> permutation to b, s, h, d; each is its own inverse
_TO_BSHD = {"bshd": (0, 1, 2, 3), "sbhd": (1, 0, 2, 3), "bhsd": (0, 2, 1, 3)}
TOKEN_LAYOUTS = ("contiguous",)


class DistAttention(torch.autograd.Function):
    """Forward and backward by schedule, all tensors `[b, s_local, heads, dim]`; returns (out, lse).

    With `known` = (out, lse) of the very same call, the forward pass computes and sends nothing and
    returns them: a recomputation that does not repeat attention.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        run: Execution,
        known: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = run.forward(q, k, v) if known is None else known
        ctx.run = run
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = ctx.run.backward(grads[0], q, k, v, out, lse)
        return dq, dk, dv, None, None


def dist_flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    group: dist.ProcessGroup | Transport | None = None,
    mask: Mask | str = Causal(),  # noqa: B008 - frozen
    schedule: str = "auto",
    token_layout: str = "contiguous",
    softmax_scale: float | None = None,
    tensor_layout: TensorLayout = "bshd",
    kernel: str = "auto",
    deterministic: bool = False,
    return_lse: bool = False,
    overlap: bool = True,
    seq_length: int | None = None,
    lengths: tuple[int, ...] | None = None,
    known: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of this rank's queries over the keys and values of all ranks of the group.

    Every rank of the group calls this with its own chunk of the sequence; the result equals
    single-device attention on the whole sequence. Grouped-query and multi-query attention are
    native.

    Args:
        q: `[b, s_local, h, dk]` (or as `tensor_layout` says), this rank's tokens.
        k: `[b, s_local, hkv, dk]`; h is a multiple of hkv.
        v: `[b, s_local, hkv, dv]`.
        group: the SP axis: a process group, a `Transport`, or None for the default process group
            (one rank when torch.distributed is not initialised).
        mask: `Causal()` or `Full()` (or its name), over positions of the whole sequence.
        schedule: "auto" or a builder's name (`schedules.names()`).
        token_layout: "contiguous": rank r owns the r-th chunk.
        softmax_scale: default dk ** -0.5.
        tensor_layout: order of batch, token, head and head-dim dims of all tensors.
        kernel: "auto" or a backend's name (`kernels.names()`).
        deterministic: ask the kernel for bitwise repeatable gradients. Sums over ranks always are.
        return_lse: also return the log-sum-exp, `[b, h, s_local]`, fp32 (fp64 for fp64 inputs),
            natural log; it carries no gradient.
        overlap: False waits for transfers before computing (slower; to measure what overlap gives).
        seq_length: tokens of the whole sequence, in chunks as even as can be, the longer ones
            first; or
        lengths: tokens of every rank. With neither, ranks tell one another their lengths at every
            call, whatever those are: one small collective that the CPU waits for. Training loops
            know the length and should say it.
        known: (out, lse) of the same call made before, to replay it without computing or sending.

    Returns:
        out, shaped as q with dv for dk, in q's dtype; or (out, lse).

    Raises:
        UnsupportedError: shapes, dtypes or a layout that do not fit together.
        ScheduleError: an unknown schedule or a mask it does not serve.
        KernelError: no kernel, or not the asked one, serves the call.
    """
    if tensor_layout not in _TO_BSHD:
        raise UnsupportedError(f"tensor_layout={tensor_layout!r}: use one of {', '.join(_TO_BSHD)}")
    if token_layout not in TOKEN_LAYOUTS:
        raise UnsupportedError(
            f"token_layout={token_layout!r}: use one of {', '.join(TOKEN_LAYOUTS)}"
        )
    order = _TO_BSHD[tensor_layout]
    q, k, v = (_checked(name, t, order) for name, t in (("q", q), ("k", k), ("v", v)))
    _check_together(q, k, v)
    transport = transport_of(group)
    transport.prepare(q.device)
    chunk_lengths = _lengths(q, transport, seq_length, lengths)
    plan = build_schedule(
        schedule,
        size=transport.size,
        lengths=chunk_lengths,
        mask=mask,
        query_heads=q.shape[2],
        kv_heads=k.shape[2],
        head_dim=q.shape[3],
        value_dim=v.shape[3],
    )
    _, chosen = kernels.select(
        kernel,
        device=q.device,
        dtype=q.dtype,
        head_dim=q.shape[3],
        value_dim=v.shape[3],
        deterministic=deterministic,
    )
    scale = q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
    run = Execution(plan, transport, chosen, scale, deterministic, overlap)
    if known is not None:
        known = known[0].permute(order), known[1]
    out, lse = DistAttention.apply(q, k, v, run, known)
    out = out.permute(order)
    return (out, lse) if return_lse else out


def _checked(name: str, tensor: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    if tensor.dim() != 4:
        raise UnsupportedError(f"{name} has shape {tuple(tensor.shape)}; it needs 4 dims")
    tensor = tensor.permute(order)
    # every kernel reads whole heads: only the last dim must be dense
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _check_together(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} as [b, s, h, d]"
    if not (q.shape[:2] == k.shape[:2] == v.shape[:2]):
        raise UnsupportedError(f"batch and token dims of q, k and v differ: {shapes}")
    if k.shape[2] != v.shape[2] or q.shape[2] % k.shape[2]:
        raise UnsupportedError(f"query heads must be a multiple of the heads of k and v: {shapes}")
    if q.shape[3] != k.shape[3]:
        raise UnsupportedError(f"q and k must have the same head dim: {shapes}")
    if not (q.dtype == k.dtype == v.dtype) or not (q.device == k.device == v.device):
        raise UnsupportedError(
            f"q, k and v must share dtype and device; got {q.dtype} on {q.device}, "
            f"{k.dtype} on {k.device}, {v.dtype} on {v.device}"
        )


def _lengths(
    q: torch.Tensor, transport: Transport, seq_length: int | None, lengths: tuple[int, ...] | None
) -> tuple[int, ...]:
    local = q.shape[1]
    if seq_length is not None:
        lengths = even_lengths(seq_length, transport.size)
    elif lengths is None:
        return transport.gather_lengths(local, q.device)
    if len(lengths) != transport.size or lengths[transport.rank] != local:
        raise UnsupportedError(
            f"rank {transport.rank} of {transport.size} holds {local} tokens, but the chunks are "
            f"{tuple(lengths)}"
        )
    return tuple(lengths)
