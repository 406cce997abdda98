# SPDX-License-Identifier: Apache-2.0
"""One kernel against fp64 attention: heads, head dims, bands, tall and wide tiles, soft-cap."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu.settings import Outcome, Scale, Settings
from benchmarks.gpu.truth import (
    LIMIT,
    Inputs,
    Results,
    Shape,
    attention,
    error_ratios,
    inputs,
    seen,
)
from megatron_seqpar.attention.kernels import Kernel, TileCall, select
from megatron_seqpar.attention.layouts import Span
from megatron_seqpar.attention.masks import Region
from megatron_seqpar.errors import KernelError


@dataclass(frozen=True)
class Case:
    """One tile. `low` and `high` as in `TileCall`, before the tile is trimmed to them."""

    name: str
    shape: Shape
    low: int | None = None
    high: int | None = None
    softcap: float = 0.0
    deterministic: bool = False
    sliced: bool = False  # the tensors are slices of longer ones with heads side by side

    def trimmed(self) -> tuple[Shape, TileCall]:
        """The tile without rows and columns that have no pair, as the executor passes it."""
        q, kv = (Span(0, size) for size in self.shape.tokens)
        region = Region(q, kv, self.low, self.high).clip(q, kv)
        assert region is not None, self
        shift = region.kv.start - region.q.start
        low, high = (None if edge is None else edge - shift for edge in region[2:])
        call = TileCall(self.shape.dim**-0.5, low, high, self.softcap, self.deterministic)
        return self.shape._replace(tokens=(region.q.size, region.kv.size)), call


HEADS = {"MHA": (8, 8), "GQA": (8, 2), "MQA": (6, 1)}


def cases(scale: Scale) -> Iterator[Case]:
    """What is checked."""
    n = 120 if scale is Scale.TINY else 1000
    dims = (16, 32) if scale is Scale.TINY else (64, 96, 128, 192, 256)
    main = dims[0] if scale is Scale.TINY else 128

    def shape(tokens: tuple[int, int], heads: str = "GQA", dim: int = main, **more: int) -> Shape:
        return Shape(tokens, *HEADS[heads], dim, more.pop("value_dim", dim), **more)

    for heads in HEADS:
        for tokens in (64, 127, n):
            yield Case(f"causal {heads} {tokens}", shape((tokens, tokens), heads, batch=2), high=0)
        yield Case(f"full {heads}", shape((n, n), heads))
    for dim in dims:
        yield Case(f"causal head dim {dim}", shape((n, n), dim=dim), high=0)
    mla = (24, 16) if scale is Scale.TINY else (192, 128)
    yield Case(f"MLA {mla[0]}/{mla[1]}", shape((n, n), "MHA", mla[0], value_dim=mla[1]), high=0)
    bands: dict[str, tuple[int, int, int | None, int | None]] = {
        "window": (n, n, -n // 4, 0),
        "window to both sides": (n, n, -n // 8, n // 16),
        "narrow window": (n, n, -1, 1),
        "inverse": (n, n, 0, None),
        "wide, full": (n // 3, n, None, None),
        "tall, full": (n, n // 3, None, None),
        "wide, ends on the diagonal": (n // 2, n, None, n - n // 2),
        "wide, leaves the diagonal": (n // 2, n, None, n // 3),
        "tall, ends on the diagonal": (n, n // 2, None, n // 2 - n),
        "tall, leaves the diagonal": (n, n // 2, None, -n // 8),
        "wide window": (n // 2, n, n // 8, n // 3),
        "tall window": (n, n // 2, -n // 2, -n // 8),
        "one query": (1, n, None, n // 2),
        "few keys": (n, 16, None, None),  # a single one has gradients of 0 and no error to compare
    }
    for name, (sq, skv, low, high) in bands.items():
        yield Case(f"band: {name}", shape((sq, skv)), low, high)
    yield Case("soft-cap", shape((n, n)), high=0, softcap=20.0)
    yield Case("soft-cap, window", shape((n, n)), -n // 4, 0, softcap=20.0)
    yield Case("slices", shape((n // 2, n), "MHA"), None, n - n // 2, sliced=True)
    yield Case("deterministic", shape((n, n)), high=0, deterministic=True)
    yield Case("deterministic, window", shape((n, n)), -n // 4, 0, deterministic=True)


def both_passes(kernel: Kernel, data: Inputs, call: TileCall) -> Results:
    """out, lse and gradients of one tile."""
    out, lse = kernel.forward(data.q, data.k, data.v, call)
    grads = kernel.backward(data.dout, data.q, data.k, data.v, out, lse, call)
    return Results(out, lse, *grads)


def sliced(data: Inputs) -> Inputs:
    """The same numbers as parts of longer tensors, queries, keys and values head by head in one."""

    def part(tensor: torch.Tensor) -> torch.Tensor:
        b, s, h, d = tensor.shape
        whole = tensor.new_full((b, s + 10, h, 2 * d), float("nan"))
        view = whole[:, 3 : s + 3, :, :d]
        view.copy_(tensor)
        return view

    return Inputs(*map(part, data))


def check(name: str, case: Case, settings: Settings) -> dict[str, Any]:
    """What one case gave: `ratios`, or why the kernel does not serve it (`refused`)."""
    shape, call = case.trimmed()
    try:
        _, kernel = select(
            name, device=settings.device, dtype=settings.half, head_dim=shape.dim,
            value_dim=shape.value_dim, deterministic=case.deterministic, softcap=case.softcap > 0,
        )  # fmt: skip
    except KernelError as reason:
        return {"refused": str(reason)}
    data = inputs(shape, settings.half, settings.device, seed=len(case.name))
    if case.sliced:
        data = sliced(data)
    got = both_passes(kernel, data, call)
    q, kv = (Span(0, size) for size in shape.tokens)
    pairs = seen((Region(q, kv, call.low, call.high),), shape.tokens, settings.device)
    truth = attention(data, pairs, torch.float64, call.scale, call.softcap)
    plain = attention(data, pairs, settings.half, call.scale, call.softcap)
    found: dict[str, Any] = {"ratios": error_ratios(got, plain, truth)}
    if case.deterministic:
        again = both_passes(kernel, data, call)
        found["repeats"] = all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    return found


def run(settings: Settings) -> Outcome:
    """All cases of the kernel `settings.kernel`."""
    outcome = Outcome()
    worst, served = 0.0, 0
    for case in cases(settings.scale):
        if settings.time_is_up:
            outcome.left_out.append(f"{case.name}: no time")
            continue
        try:
            found = check(settings.kernel, case, settings)
        except Exception as failure:  # one case that breaks must not hide the others
            outcome.failures.append(
                f"{case.name}: {type(failure).__name__}: {_first_line(failure)}"
            )
            continue
        outcome.data[case.name] = found
        if "refused" in found:
            outcome.left_out.append(f"{case.name}: {found['refused']}")
            continue
        served += 1
        ratio = max(found["ratios"].values())
        worst = max(worst, ratio)
        if ratio > LIMIT:
            outcome.failures.append(f"{case.name}: error ratios {_shown(found['ratios'])}")
        if not found.get("repeats", True):
            outcome.failures.append(f"{case.name}: two runs differ")
    outcome.nothing = not served
    outcome.data["worst_ratio"] = worst
    outcome.says = f"{served} cases, worst error {worst:.2f} x plain attention's (limit {LIMIT:g})"
    return outcome


def _first_line(failure: Exception) -> str:
    return (str(failure).splitlines() or [""])[0]


def _shown(ratios: dict[str, float]) -> str:
    return ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
