# SPDX-License-Identifier: Apache-2.0
"""`search`: every layout that a number of ranks allows, those that fit in the order of `ranking`.

What is tried is every split of the ranks over TP, SP, PP and DP, with each EP, virtual pipeline,
micro-batch, ZeRO stage and TP-SP. Two choices follow from the others and are made on the spot: the
schedule of attention is the fastest for its SP axis, and memory is saved by the cheapest way that
makes the layout fit, in the order of `_SAVINGS`, in which each costs more time than the one before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

from ..errors import UnsupportedError
from ..mfu import Model
from .attention import attention_time
from .estimate import Estimate, estimate, peak_memory
from .hardware import Cluster
from .layout import SCHEDULES, Layout, impossible
from .ranking import ranked

_MICRO_BATCHES = (1, 2, 4, 8)
_VIRTUAL = (1, 2, 4)
_PIECES = 16
# recomputation, pieces of the MLP, pieces of the loss
_SAVINGS = (
    ("none", 0, 0),
    ("none", 0, _PIECES),
    ("mlp", 0, 0),
    ("mlp", 0, _PIECES),
    ("mlp", _PIECES, _PIECES),
    ("attention-qkv", 0, 0),
    ("attention-qkv", 0, _PIECES),
    ("attention-qkv", _PIECES, _PIECES),
    ("attention-output", 0, 0),
    ("attention-output", 0, _PIECES),
    ("attention-output", _PIECES, _PIECES),
    ("full", 0, 0),
)


@dataclass(frozen=True)
class Found:
    """Outcome of a search.

    Attributes:
        fitting: layouts that fit, the best first (ranking.py).
        nearest: layouts that do not fit however memory is saved, the one that lacks least first.
        counted: layouts whose memory was looked at.
        refused: constraints that forbade layouts, with how many each, the most frequent first.
    """

    fitting: tuple[Estimate, ...]
    nearest: tuple[Estimate, ...]
    counted: int
    refused: tuple[tuple[str, int], ...]


def search(
    model: Model,
    cluster: Cluster,
    *,
    ranks: int,
    sequence_length: int,
    global_batch: int,
    keep: int = 10,
) -> Found:
    """Search all layouts of `ranks` ranks for `global_batch` sequences a step.

    Raises UnsupportedError when no layout is possible at all, with the constraints.
    """
    reasons: dict[str, int] = {}
    counted = 0
    fitting: list[tuple[float, Layout]] = []
    nearest: list[tuple[float, Layout]] = []
    for axes in _axes(model, cluster, ranks, sequence_length, global_batch):
        reason = impossible(model, axes)
        if reason is not None:
            reasons[reason] = reasons.get(reason, 0) + 1
            continue
        last: tuple[float, Layout] | None = None
        for layout in _savings(axes):
            if impossible(model, layout) is not None:
                continue
            counted += 1
            over = peak_memory(model, cluster, layout) - cluster.capacity.value
            if over <= 0:
                fitting.append((estimate(model, cluster, layout).step_time, layout))
                last = None
                break
            if last is None or over < last[0]:
                last = (over, layout)
        if last is not None:
            nearest.append(last)
    refused = tuple(sorted(reasons.items(), key=lambda item: -item[1]))
    if not counted:
        text = "; ".join(reason for reason, _ in refused[:5])
        raise UnsupportedError(f"no layout of {ranks} ranks is possible: {text}")

    def made(ordered: list[tuple[float, Layout]]) -> tuple[Estimate, ...]:
        return tuple(estimate(model, cluster, layout) for _, layout in ordered[:keep])

    best = ranked(fitting, lambda item: item[0], lambda item: item[1])
    short = sorted(nearest, key=lambda item: item[0])
    return Found(made(best), made(short), counted, refused)


def divisors(number: int) -> list[int]:
    """All of them, in order."""
    return [each for each in range(1, number + 1) if number % each == 0]


def _axes(
    model: Model, cluster: Cluster, ranks: int, sequence_length: int, global_batch: int
) -> Iterator[Layout]:
    """Every split of the ranks, before memory is saved."""
    for tp in divisors(ranks):
        if tp > cluster.node_size:
            continue  # tensor parallelism over the network is never worth it
        for pp in divisors(ranks // tp):
            if pp > model.layers:
                continue
            for sp in divisors(ranks // tp // pp):
                dp = ranks // tp // pp // sp
                if dp > global_batch:
                    continue
                for layout in _finer(model, sequence_length, global_batch, (tp, sp, pp, dp)):
                    yield replace(layout, schedule=_schedule(model, cluster, layout))


def _finer(
    model: Model, sequence_length: int, global_batch: int, axes: tuple[int, int, int, int]
) -> Iterator[Layout]:
    tp, sp, pp, dp = axes
    experts = [ep for ep in divisors(dp * sp) if model.experts and ep <= model.experts] or [1]
    virtual = _VIRTUAL if pp > 1 else (1,)
    # stages 2 and 3 are Megatron FSDP; without replicas nothing can be sharded
    zeros = (0,) if dp * sp == 1 else (0, 1) if pp > 1 or sp > 1 else (0, 1, 2, 3)
    splits = (True, False) if tp > 1 else (False,)
    for ep, vpp, micro, zero, tp_sp in product(experts, virtual, _MICRO_BATCHES, zeros, splits):
        if micro * dp > global_batch:
            continue
        yield Layout(
            sequence_length=sequence_length,
            global_batch=global_batch,
            tp=tp,
            sp=sp,
            pp=pp,
            dp=dp,
            ep=ep,
            vpp=vpp,
            micro_batch=micro,
            zero=zero,
            tp_sp=tp_sp,
        )


def _savings(layout: Layout) -> Iterator[Layout]:
    for recompute, mlp, loss in _SAVINGS:
        yield replace(layout, recompute=recompute, mlp_chunks=mlp, loss_chunks=loss)


def _schedule(model: Model, cluster: Cluster, layout: Layout) -> str:
    """The fastest schedule for the layout's SP axis."""
    if layout.sp == 1:
        return layout.schedule
    plain = Layout(
        layout.sequence_length,
        layout.global_batch,
        tp=layout.tp,
        sp=layout.sp,
        micro_batch=layout.micro_batch,
    )
    return _fastest(model, cluster, plain)


@lru_cache(maxsize=4096)
def _fastest(model: Model, cluster: Cluster, layout: Layout) -> str:
    def seconds(name: str) -> float:
        made = replace(layout, schedule=name)
        both = attention_time(model, cluster, made, "forward")
        both = both + attention_time(model, cluster, made, "backward")
        return both.compute + both.exposed

    return min(SCHEDULES, key=seconds)
