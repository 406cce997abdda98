# SPDX-License-Identifier: Apache-2.0
"""What every rank of the attention benchmark does: compare, warm up, time in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..attention import TokenLayout
from ..errors import KernelError
from .attention_cells import BUSY, ONE_RANK, Cell, Sizes, layout_of
from .place import Place
from .ranks import Emit, say
from .rounds import interleave

if TYPE_CHECKING:
    import torch

    from .watch import Watch

_SOON = 1.0  # seconds under which a second warm-up call is made to time it


class _Pass:
    """Forward and backward of one way: calling it leaves nothing behind."""

    def __init__(self, tensors: Sequence[torch.Tensor], **options: Any) -> None:
        *inputs, self.dout = tensors
        self.inputs = [tensor.detach().requires_grad_() for tensor in inputs]
        self.options = options

    def results(self) -> list[torch.Tensor]:
        """Output and gradients of q, k and v."""
        from ..attention import dist_flash_attention

        out = dist_flash_attention(*self.inputs, **self.options)
        assert not isinstance(out, tuple)
        out.backward(self.dout)
        found = [out.detach(), *(tensor.grad for tensor in self.inputs)]
        for tensor in self.inputs:
            tensor.grad = None
        return [tensor for tensor in found if tensor is not None]

    def __call__(self) -> None:
        self.results()


def measure_cells(
    device: torch.device, emit: Emit, cells: list[Cell], sizes: Sizes, place: Place, rounds: int
) -> None:
    """Rank 0 emits, a cell: kernel, seconds by round and way, calls, differences; or `refused`."""
    for cell in cells:
        raw = _measure_cell(device, cell, sizes, place, rounds)
        if _rank() == 0:
            emit(raw)


def _measure_cell(
    device: torch.device, cell: Cell, sizes: Sizes, place: Place, rounds: int
) -> dict[str, Any]:
    import torch

    from ..attention.kernels import select
    from .watch import Watch

    watch = Watch(device)
    dtype = getattr(torch, sizes.dtype)
    try:
        kernel, _ = select(cell.kernel, device=device, dtype=dtype, head_dim=sizes.head_dim)
    except KernelError as why:
        return {"refused": str(why), "kernel": cell.kernel}
    works, differences = _prepared(device, watch, cell, kernel, sizes, place)

    def timed(way: str, calls: int) -> float:
        return (watch.seconds_alone if way == ONE_RANK else watch.seconds)(works[way], calls)

    calls = {}
    for name in works:
        once = timed(name, 1)
        calls[name] = watch.calls_of(timed(name, 1) if once < _SOON else once)
    measured = interleave(list(works), rounds, lambda name, _: timed(name, calls[name]))
    if _rank() == 0:
        shown = ", ".join(f"{way} {seconds:.3g} s" for way, seconds in measured[-1].items())
        ranks = f"{place.ranks} rank{'s' * (place.ranks > 1)}"
        say(f"{ranks}, {kernel}, {cell.tokens:,} tokens, last round: {shown}")
    return {"kernel": kernel, "rounds": measured, "calls": calls, "differences": differences}


def _prepared(
    device: torch.device, watch: Watch, cell: Cell, kernel: str, sizes: Sizes, place: Place
) -> tuple[dict[str, Callable[[], object]], dict[str, float]]:
    """What is to be timed, by name, warm; and each way's largest difference from one rank.

    Without the ways of one rank, and without differences, where memory does not suffice for them.
    """
    import torch
    import torch.distributed as dist

    from ..attention import LocalTransport, ProcessGroupTransport

    assert dist.group.WORLD is not None
    axis = ProcessGroupTransport(dist.group.WORLD)
    common = {"kernel": kernel, "mask": sizes.mask}
    whole = _tensors(cell.tokens, sizes, device, getattr(torch, sizes.dtype))
    alone = _Pass(whole, group=LocalTransport(), **common)
    expected: list[torch.Tensor] = []
    works: dict[str, Callable[[], object]] = {}
    if watch.tried(lambda: expected.extend(alone.results())):
        works = {ONE_RANK: alone, BUSY: alone} if place.ranks > 1 else {ONE_RANK: alone}
    else:
        expected.clear()
    differences = {}
    for way in cell.ways:
        layout = layout_of(way, place.ranks, cell.tokens)
        mine = _Pass(
            [_mine(tensor, layout) for tensor in whole],
            group=axis,
            schedule=way.schedule,
            token_layout=way.token_layout,
            overlap=way.overlap,
            seq_length=cell.tokens,
            node_size=place.node_size,
            **common,
        )
        found = mine.results()
        if expected:
            pairs = zip(found, (_mine(t, layout) for t in expected), strict=True)
            differences[way.name] = watch.largest(max(_difference(a, b) for a, b in pairs))
        works[way.name] = mine
    if not works:
        raise MemoryError("out of memory: not even one rank's attention fits")
    return works, differences


def _rank() -> int:
    import torch.distributed as dist

    return dist.get_rank()


def _tensors(
    tokens: int, sizes: Sizes, device: torch.device, dtype: torch.dtype
) -> list[torch.Tensor]:
    """q, k, v and the output's gradient, `[b, s, h, d]`, of the whole sequence; equal on ranks."""
    import torch

    generator = torch.Generator(device).manual_seed(0)
    heads = (sizes.heads, sizes.kv_heads, sizes.kv_heads, sizes.heads)
    return [
        torch.randn(
            (sizes.batch, tokens, count, sizes.head_dim),
            generator=generator, device=device, dtype=dtype,
        )
        for count in heads
    ]  # fmt: skip


def _mine(tensor: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """This rank's tokens of a whole tensor, a copy."""
    import torch

    spans = layout.pieces[_rank()]
    return torch.cat([tensor[:, span.start : span.stop] for span in spans], dim=1)


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference relative to the largest expected value."""
    import torch

    wide = torch.promote_types(expected.dtype, torch.float32)
    found, expected = found.to(wide), expected.to(wide)
    return float((found - expected).abs().max() / expected.abs().max())
