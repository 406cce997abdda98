# SPDX-License-Identifier: Apache-2.0
"""`dist_flash_attention`: exact, differentiable attention over a split sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist

from ..errors import UnsupportedError
from ..simulate import Cluster
from . import kernels
from .execute import Execution
from .layouts import TokenLayout, even_lengths
from .masks import Causal, Mask, Samples, as_mask
from .recorder import SILENT, Recorder
from .schedules import build_schedule
from .transport import Transport, transport_of

TensorLayout = Literal["bshd", "sbhd", "bhsd"]

# tensor layout -> permutation to b, s, h, d; each is its own inverse
_TO_BSHD = {"bshd": (0, 1, 2, 3), "sbhd": (1, 0, 2, 3), "bhsd": (0, 2, 1, 3)}
TOKEN_LAYOUTS = ("contiguous", "zigzag")


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
        sink: torch.Tensor | None,
        run: Execution,
        known: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = run.forward(q, k, v, sink) if known is None else known
        ctx.run = run
        ctx.save_for_backward(q, k, v, out, lse, sink)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse, sink = ctx.saved_tensors
        dq, dk, dv = ctx.run.backward(grads[0], q, k, v, out, lse)
        dsink = None
        if sink is not None and ctx.needs_input_grad[3]:
            dsink = _sink_gradient(grads[0], out, lse, sink)
        return dq, dk, dv, dsink, None, None


def _sink_gradient(
    dout: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, sink: torch.Tensor
) -> torch.Tensor:
    """This rank's share of the sink's gradient: the sink has value 0, so dp = 0 and ds = -p delta.

    Shapes as in `DistAttention`; returns `[h]` in the dtype of `sink`.
    """
    delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1).transpose(1, 2)
    probability = torch.exp(sink.to(lse.dtype)[:, None] - lse)
    return -(probability * delta).sum((0, 2)).to(sink.dtype)


def dist_flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    group: dist.ProcessGroup | Transport | None = None,
    mask: Mask | str | Sequence[Mask] = Causal(),  # noqa: B008 - frozen
    schedule: str = "auto",
    token_layout: str = "contiguous",
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    sink: torch.Tensor | None = None,
    tensor_layout: TensorLayout = "bshd",
    kernel: str = "auto",
    deterministic: bool = False,
    return_lse: bool = False,
    overlap: bool = True,
    seq_length: int | None = None,
    lengths: tuple[int, ...] | None = None,
    node_size: int | None = None,
    cluster: Cluster | None = None,
    known: tuple[torch.Tensor, torch.Tensor] | None = None,
    recorder: Recorder = SILENT,
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
        mask: which pairs interact, over positions of the whole sequence: a mask of `masks.py`, its
            text (`as_mask`), or one for each sample of the batch. A query that sees no key gets 0.
        schedule: "auto" or a builder's name (`schedules.names()`).
        token_layout: "contiguous": rank r owns the r-th chunk; "zigzag": pieces r and 2P-1-r of 2P.
        softmax_scale: above 0; default dk ** -0.5.
        softcap: scores become softcap * tanh(scores / softcap) (Gemma 2); 0 for none.
        sink: `[h]`, per query head the score of a key with value zero that every query sees, a
            further term of the softmax's denominator; it gets this rank's share of its gradient.
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
        node_size: ranks that share a node's fast links, consecutive group ranks; default: all.
        cluster: what "auto" reckons with (`megatron_seqpar.simulate`), the same on every rank; None
            for a stand-in by device type.
        known: (out, lse) of the same call made before, to replay it without computing or sending.
        recorder: told what the executor does when (`recorder.py`).

    Returns:
        out, shaped as q with dv for dk, in q's dtype; or (out, lse).

    Raises:
        UnsupportedError: shapes, dtypes or a layout that do not fit together, or a scale, cap or
            sink out of range.
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
    scale = q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
    _check_softmax(q, scale, softcap, sink)
    batch = q.shape[0]
    transport = transport_of(group)
    transport.prepare(q.device)
    layout = _layout(token_layout, q, transport, seq_length, lengths)
    masks = _masks(mask, batch, layout.seq_length)
    together = isinstance(masks, Samples)
    if together:  # one sequence, sample after sample, each with a mask of its own
        layout = layout.repeated(batch)
        q, k, v = (t.flatten(0, 1).unsqueeze(0) for t in (q, k, v))
    plan = build_schedule(
        schedule,
        layout=layout,
        mask=masks,
        query_heads=q.shape[2],
        kv_heads=k.shape[2],
        head_dim=q.shape[3],
        value_dim=v.shape[3],
        node_size=node_size,
        dtype=q.dtype,
        device=q.device.type,
        batch=q.shape[0],
        cluster=cluster,
    )
    _, chosen = kernels.select(
        kernel,
        device=q.device,
        dtype=q.dtype,
        head_dim=q.shape[3],
        value_dim=v.shape[3],
        deterministic=deterministic,
        softcap=bool(softcap),
    )
    run = Execution(plan, transport, chosen, scale, softcap, deterministic, overlap, recorder)
    if known is not None:
        known = _fold(known[0].permute(order), known[1], together)
    apply: Callable[..., tuple[torch.Tensor, torch.Tensor]] = DistAttention.apply
    out, lse = apply(q, k, v, sink, run, known)
    out, lse = _unfold(out, lse, batch, together)
    out = out.permute(order)
    return (out, lse) if return_lse else out


def _fold(
    out: torch.Tensor, lse: torch.Tensor, together: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lay the samples of (out `[b, s, h, d]`, lse `[b, h, s]`) end to end."""
    if not together:
        return out, lse
    return out.flatten(0, 1).unsqueeze(0), lse.transpose(0, 1).flatten(1).unsqueeze(0)


def _unfold(
    out: torch.Tensor, lse: torch.Tensor, batch: int, together: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of `_fold`."""
    if not together:
        return out, lse
    return out[0].unflatten(0, (batch, -1)), lse[0].unflatten(1, (batch, -1)).transpose(0, 1)


def _masks(mask: Mask | str | Sequence[Mask], batch: int, seq_length: int) -> Mask:
    """One mask for all samples, or `Samples` when they differ."""
    if isinstance(mask, str) or not isinstance(mask, Sequence):
        return as_mask(mask)
    masks = tuple(as_mask(one) for one in mask)
    if len(masks) != batch:
        raise UnsupportedError(f"{len(masks)} masks for a batch of {batch}: give one a sample")
    if all(other == masks[0] for other in masks):
        return masks[0]
    return Samples(masks, seq_length)


def _checked(name: str, tensor: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    if tensor.dim() != 4:
        raise UnsupportedError(f"{name} has shape {tuple(tensor.shape)}; it needs 4 dims")
    tensor = tensor.permute(order)
    # every kernel reads whole heads: only the last dim must be dense
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _check_together(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} as [b, s, h, d]"
    if 0 in (q.shape[0], *q.shape[2:], *k.shape[2:], *v.shape[2:]):
        raise UnsupportedError(f"batch, heads and head dims must be at least 1: {shapes}")
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


def _check_softmax(
    q: torch.Tensor, scale: float, softcap: float, sink: torch.Tensor | None
) -> None:
    # kernels take the largest score before they scale, and a negative cap as none
    if not scale > 0:
        raise UnsupportedError(f"softmax_scale={scale} must be above 0")
    if not softcap >= 0:
        raise UnsupportedError(f"softcap={softcap} must be above 0, or 0 for none")
    if sink is not None and (sink.shape != q.shape[2:3] or sink.device != q.device):
        raise UnsupportedError(
            f"sink of shape {tuple(sink.shape)} on {sink.device}: give one score a query head, "
            f"({q.shape[2]},) on {q.device}"
        )


def _layout(
    token_layout: str,
    q: torch.Tensor,
    transport: Transport,
    seq_length: int | None,
    lengths: Sequence[int] | None,
) -> TokenLayout:
    local, size = q.shape[1], transport.size
    if token_layout == "zigzag":
        total = sum(lengths) if lengths is not None else seq_length
        if total is None:
            total = sum(transport.gather_lengths(local, q.device))
        layout = TokenLayout.zigzag(size, total)
    else:
        if seq_length is not None:
            lengths = even_lengths(seq_length, size)
        elif lengths is None:
            lengths = transport.gather_lengths(local, q.device)
        if len(lengths) != size:
            raise UnsupportedError(f"lengths {tuple(lengths)} are not one a rank of {size}")
        layout = TokenLayout.contiguous(size, lengths=lengths)
    if layout.lengths[transport.rank] != local:
        raise UnsupportedError(
            f"rank {transport.rank} of {size} holds {local} tokens, but the {token_layout} token "
            f"layout gives the ranks {layout.lengths}"
        )
    return layout
