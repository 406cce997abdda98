# SPDX-License-Identifier: Apache-2.0
"""TFLOP/s of one kernel, forward and backward, by kind and size of tile.

Floating-point operations are those of the matrix products over the pairs that interact, and no
others: forward 2 h n (dk + dv), for scores and output; backward 2 h n (3 dk + 2 dv), for scores
again, dp, dv, dq and dk; h query heads, n interacting pairs a head, masked pairs not counted.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.gpu.settings import Outcome, Settings
from benchmarks.gpu.timing import clocks, time_calls
from benchmarks.gpu.truth import Shape, inputs
from megatron_seqpar.attention.kernels import TileCall, select
from megatron_seqpar.attention.layouts import Span
from megatron_seqpar.attention.masks import Region
from megatron_seqpar.errors import KernelError

EDGES: dict[str, tuple[int | None, int | None]] = {"causal": (None, 0), "full": (None, None)}


@dataclass(frozen=True)
class Case:
    """A square tile of `tokens` x `tokens`; kind "causal", "full" or "window W" (W keys back)."""

    kind: str
    tokens: int
    heads: int
    kv_heads: int
    dim: int

    @property
    def edges(self) -> tuple[int | None, int | None]:
        """`low` and `high` of the tile."""
        if self.kind in EDGES:
            return EDGES[self.kind]
        return -int(self.kind.split()[1]), 0

    @property
    def pairs(self) -> int:
        """Interacting (query, key) pairs of one head."""
        return Region(Span(0, self.tokens), Span(0, self.tokens), *self.edges).pairs

    @property
    def forward_flops(self) -> int:
        """See the text at the top."""
        return 4 * self.heads * self.pairs * self.dim

    @property
    def backward_flops(self) -> int:
        """See the text at the top."""
        return 10 * self.heads * self.pairs * self.dim


def cases(settings: Settings) -> list[Case]:
    """What is timed: about as many elements a token whatever the head dim."""
    k = 1024
    sizes = settings.pick(
        full=[2 * k, 4 * k, 8 * k, 16 * k, 32 * k], quick=[4 * k, 16 * k], tiny=[64, 128]
    )
    heads = settings.pick(full={64: 32, 128: 16}, quick={64: 32, 128: 16}, tiny={16: 2, 32: 2})
    dims = list(heads)
    window = settings.pick(full=4 * k, quick=4 * k, tiny=32)
    listed = [
        Case(kind, tokens, heads[dim], heads[dim], dim)
        for dim in dims
        for kind in EDGES
        for tokens in sizes
    ]
    group = settings.pick(full=4, quick=4, tiny=2)
    long = sizes[-2]  # grouped heads and windows at one length
    many = heads[dims[-1]] * 2
    listed.append(Case("causal", long, many, many // group, dims[-1]))
    listed += [
        Case(f"window {window}", t, heads[d], heads[d], d)
        for d in dims
        for t in sizes
        if t > window
    ]
    return listed


def measure(name: str, case: Case, settings: Settings) -> dict[str, Any]:
    """Milliseconds and TFLOP/s of both passes."""
    _, kernel = select(name, device=settings.device, dtype=settings.half, head_dim=case.dim)
    shape = Shape((case.tokens, case.tokens), case.heads, case.kv_heads, case.dim, case.dim)
    q, k, v, dout = inputs(shape, settings.half, settings.device)
    call = TileCall(case.dim**-0.5, *case.edges)
    out, lse = kernel.forward(q, k, v, call)
    seconds = settings.pick(full=0.25, quick=0.1, tiny=0.01)
    forward = time_calls(lambda: kernel.forward(q, k, v, call), settings.device, seconds=seconds)
    backward = time_calls(
        lambda: kernel.backward(dout, q, k, v, out, lse, call), settings.device, seconds=seconds
    )
    return {
        **asdict(case),
        "forward_ms": forward._asdict(),
        "backward_ms": backward._asdict(),
        "forward_tflops": case.forward_flops / forward.median / 1e9,
        "backward_tflops": case.backward_flops / backward.median / 1e9,
    }


def run(settings: Settings) -> Outcome:
    """All cases of the kernel `settings.kernel`."""
    outcome = Outcome(data={"clocks_before": clocks(), "rows": []})
    for case in cases(settings):
        if settings.time_is_up:
            outcome.left_out.append(f"{case}: no time")
            continue
        try:
            outcome.data["rows"].append(measure(settings.kernel, case, settings))
        except KernelError as reason:
            outcome.left_out.append(f"{case}: {reason}")
        except torch.OutOfMemoryError:
            outcome.left_out.append(f"{case}: out of memory")
    outcome.data["clocks_after"] = clocks()
    rows = outcome.data["rows"]
    outcome.nothing = not rows
    best = {key: max((row[key] for row in rows), default=0.0) for key in (
        "forward_tflops", "backward_tflops")}  # fmt: skip
    outcome.says = (
        f"{len(rows)} tiles; at best {best['forward_tflops']:.3g} TFLOP/s forward, "
        f"{best['backward_tflops']:.3g} backward"
    )
    return outcome


def against_best(rows_by_kernel: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """For every tile and pass: each kernel's TFLOP/s, and the kernel that is fastest."""
    tiles: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for kernel, rows in rows_by_kernel.items():
        for row in rows:
            key = tuple(row[name] for name in ("kind", "tokens", "heads", "kv_heads", "dim"))
            tiles.setdefault(key, {})[kernel] = row
    compared = []
    for (kind, tokens, heads, kv_heads, dim), kernels in tiles.items():
        for direction in ("forward", "backward"):
            rates = {name: row[f"{direction}_tflops"] for name, row in kernels.items()}
            about = {
                "kind": kind,
                "tokens": tokens,
                "heads": heads,
                "kv_heads": kv_heads,
                "dim": dim,
            }
            best = max(rates, key=rates.__getitem__)
            compared.append({**about, "pass": direction, "tflops": rates, "best": best})
    return compared
