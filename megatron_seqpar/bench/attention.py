# SPDX-License-Identifier: Apache-2.0
"""Distributed attention against one rank on the same kernel: forward and backward together.

In every round come, in turn: one rank with the whole sequence while the others rest; the same on
all at once, each for itself (on a CPU cores share caches and memory, so this is slower); every
schedule. `efficiency` is one rank's time over P times a schedule's: 1 means that splitting costs
nothing. Against the busy machine it leaves out what the cores cost each other.

All ways compute the same attention: before anything is timed, each one's output and gradients are
compared with those of one rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..attention import Schedule, TokenLayout, as_mask, build_schedule
from ..errors import KernelError, ScheduleError, SeqParError, UnsupportedError
from ..simulate import attention_flops
from .place import Place
from .ranks import Emit, Row, on_ranks, say
from .rounds import interleave, median_ratio, spread

if TYPE_CHECKING:
    import torch

    from .watch import Watch

ONE_RANK = "one rank"
BUSY = "one rank, all busy"
_SOON = 1.0  # seconds under which a second warm-up call is made to time it


@dataclass(frozen=True)
class Sizes:
    """Of the tensors: heads, dims, samples, dtype by torch's name, and the mask's text."""

    heads: int
    kv_heads: int
    head_dim: int
    batch: int
    dtype: str
    mask: str


@dataclass(frozen=True)
class Way:
    """One way to split attention."""

    schedule: str
    token_layout: str = "contiguous"
    overlap: bool = True

    @property
    def name(self) -> str:
        """As tables and pictures show it."""
        tokens = "" if self.token_layout == "contiguous" else f", {self.token_layout} tokens"
        return f"{self.schedule}{tokens}{'' if self.overlap else ', no overlap'}"


@dataclass(frozen=True)
class Cell:
    """What is measured in the same rounds: a kernel, a length, and the ways that serve it."""

    kernel: str
    tokens: int
    ways: tuple[Way, ...]


def ways_of(schedules: Sequence[str], layouts: Sequence[str], without_overlap: bool) -> list[Way]:
    """Every schedule on every token layout, with overlap and, if wanted, without."""
    overlaps = (True, False) if without_overlap else (True,)
    return [Way(s, layout, o) for layout in layouts for s in schedules for o in overlaps]


def layout_of(way: Way, ranks: int, tokens: int) -> TokenLayout:
    """Who owns which tokens."""
    if way.token_layout == "zigzag":
        return TokenLayout.zigzag(ranks, tokens)
    return TokenLayout.contiguous(ranks, seq_length=tokens)


def plan_of(way: Way, place: Place, tokens: int, sizes: Sizes) -> Schedule:
    """The schedule that a way runs. ScheduleError or UnsupportedError where it cannot."""
    return build_schedule(
        way.schedule,
        layout=layout_of(way, place.ranks, tokens),
        mask=sizes.mask,
        query_heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        node_size=place.node_size,
        dtype=sizes.dtype,
        device=place.device,
        batch=sizes.batch,
    )


def measure(
    places: Sequence[Place],
    kernels: Sequence[str],
    lengths: Sequence[int],
    ways: Sequence[Way],
    sizes: Sizes,
    rounds: int,
) -> list[Row]:
    """Rows of all places, kernels, lengths and ways, in this order.

    Raises SeqParError where nothing can be measured: no way serves the sizes, or the one kernel
    does not.
    """
    as_mask(sizes.mask)
    rows: list[Row] = []
    for place in places:
        cells, refused = [], []
        for kernel in kernels:
            for tokens in sorted(lengths):
                served, not_served = _served(place, tokens, ways, sizes)
                cells.append(Cell(kernel, tokens, served))
                refused.append(not_served)
        raws = _run(place, cells, sizes, rounds)
        for cell, raw, not_served in zip(cells, raws, refused, strict=False):
            if "refused" in raw and len(kernels) == 1:
                raise KernelError(raw["refused"])
            rows += rows_of(cell, raw, place, sizes)
            rows += [
                {**_key(cell, raw, place), "way": way.name, "status": "refused", "why": why}
                for way, why in not_served.items()
            ]
    return rows


def _served(
    place: Place, tokens: int, ways: Sequence[Way], sizes: Sizes
) -> tuple[tuple[Way, ...], dict[Way, str]]:
    """Ways that have a schedule here, and why the others have none."""
    served, refused = [], {}
    for way in ways if place.ranks > 1 else ():
        try:
            plan_of(way, place, tokens, sizes)
            served.append(way)
        except (ScheduleError, UnsupportedError) as why:
            refused[way] = str(why)
    if refused and not served:
        raise SeqParError("; ".join(dict.fromkeys(refused.values())))
    return tuple(served), refused


def _run(place: Place, cells: list[Cell], sizes: Sizes, rounds: int) -> list[Row]:
    """What ranks measured of each cell; a cell that memory does not suffice for ends its ranks."""
    done: list[Row] = []
    too_long: dict[str, int] = {}  # by kernel
    while len(done) < len(cells):
        cell = cells[len(done)]
        if cell.kernel in too_long:
            why = f"{too_long[cell.kernel]:,} tokens did not fit"
            done.append({"oom": why, "kernel": _resolved(cell.kernel, cells, done)})
            continue
        gathered = on_ranks(_measure, place, cells[len(done) :], sizes, place, rounds)
        done += gathered.rows
        if gathered.failure is None:
            return done
        if gathered.failure != "oom" or place.started:
            raise SeqParError(gathered.text)
        failed = cells[len(done)]
        too_long[failed.kernel] = failed.tokens
        kernel = _resolved(failed.kernel, cells, done)
        done.append({"oom": gathered.text.splitlines()[-1], "kernel": kernel})
    return done


def _resolved(kernel: str, cells: Sequence[Cell], done: Sequence[Row]) -> str:
    """What a kernel's name meant where it was measured: `auto` is none."""
    known = [str(raw["kernel"]) for cell, raw in zip(cells, done, strict=False)
             if cell.kernel == kernel]  # fmt: skip
    return known[0] if known else kernel


# ---- on every rank --------------------------------------------------------------------------


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


def _measure(
    device: torch.device, emit: Emit, cells: list[Cell], sizes: Sizes, place: Place, rounds: int
) -> None:
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


# ---- rows -----------------------------------------------------------------------------------


def _key(cell: Cell, raw: Row, place: Place) -> Row:
    kernel = raw.get("kernel", cell.kernel)
    return {"ranks": place.ranks, "kernel": kernel, "tokens": cell.tokens}


def rows_of(cell: Cell, raw: Row, place: Place, sizes: Sizes) -> list[Row]:
    """Rows of one cell from what its ranks measured."""
    key = _key(cell, raw, place)
    names = [ONE_RANK, *([BUSY] if place.ranks > 1 else [])]
    every: dict[str, Way | None] = {
        **dict.fromkeys(names), **{way.name: way for way in cell.ways}
    }  # fmt: skip
    for status in ("refused", "oom"):
        if status in raw:
            return [{**key, "way": name, "status": status, "why": raw[status]} for name in every]
    flops = _flops(cell.tokens, sizes)
    first = cell.ways[0].name if cell.ways else ONE_RANK
    rows = []
    for name, way in every.items():
        if name not in raw["calls"]:
            why = "one rank has not memory enough for the whole sequence"
            rows.append({**key, "way": name, "status": "oom", "why": why})
            continue
        times = spread([seconds[name] for seconds in raw["rounds"]])
        busy = place.ranks if way else 1  # ranks that share the work
        row = {**key, "way": name, "status": "ok", **times, "calls": raw["calls"][name]}
        row["tflops_per_rank"] = flops / times["seconds"] / busy / 1e12
        if way is not None:
            speedup = median_ratio(raw["rounds"], ONE_RANK, name)
            against_busy = median_ratio(raw["rounds"], BUSY, name)
            row |= {
                "efficiency": speedup and speedup / place.ranks,
                "efficiency_busy": against_busy and against_busy / place.ranks,
                "over_first": median_ratio(raw["rounds"], name, first),
                "largest_difference_from_one_rank": raw["differences"].get(name),
                **_counted(plan_of(way, place, cell.tokens, sizes), sizes),
            }
        rows.append(row)
    return rows


def _flops(tokens: int, sizes: Sizes) -> int:
    """FLOPs of both passes over the pairs that the mask leaves."""
    alone = Place("cpu", 1, 1)
    work = plan_of(Way("balanced"), alone, tokens, sizes).total_work
    dim = sizes.head_dim
    return sizes.batch * sum(
        attention_flops(work, 1, dim, dim, direction) for direction in ("forward", "backward")
    )


def _counted(plan: Schedule, sizes: Sizes) -> Row:
    """The schedule's own numbers."""
    sent = [
        plan.bytes_sent(rank, direction, sizes.dtype, batch=sizes.batch)
        for rank in range(plan.size)
        for direction in ("forward", "backward")
    ]
    return {
        "schedule": plan.name,
        "idle_fraction": plan.idle_fraction,
        "bytes_sent_per_rank": sum(sent) / plan.size,
        "tiles_per_rank": sum(len(s.tiles) for steps in plan.plan for s in steps) / plan.size,
    }


def settings(sizes: Sizes, rounds: int) -> dict[str, Any]:
    """What a result says of the tensors."""
    return {**asdict(sizes), "rounds": rounds, "passes": "forward and backward"}
