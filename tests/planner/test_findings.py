# SPDX-License-Identifier: Apache-2.0
"""What the Layouts study (arXiv 2311.05610) found out by measuring, as the planner's output.

Its models, its hardware, 4M tokens a step; the planner sees sizes alone.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from megatron_seqpar.mfu import Model
from megatron_seqpar.planner import Estimate, estimate
from megatron_seqpar.planner.layout import impossible
from megatron_seqpar.planner.ranking import ranked

from .models import LLAMA_13B, LLAMA_30B, LLAMA_65B, cluster, study


def grid(
    made: Model, ranks: int, *, length: int = 2048, **choices: tuple[object, ...]
) -> list[Estimate]:
    """Layouts that fit, in the planner's order, over TP, PP, micro-batch and `choices`."""
    axes: dict[str, tuple[object, ...]] = {
        "tp": (1, 2, 4, 8),
        "pp": (1, 2, 4),
        "micro_batch": (1, 2, 4, 8),
        "recompute": ("none", "full"),
        "tp_sp": (False,),
        **choices,
    }
    found = []
    for values in product(*axes.values()):
        layout = study(ranks, length=length, **dict(zip(axes, values, strict=True)))  # type: ignore[arg-type]
        if layout.tp_sp and layout.tp == 1:
            continue
        if layout.dp and impossible(made, layout) is None:
            each = estimate(made, cluster(), layout)
            if each.fits:
                found.append(each)
    return ranked(found, lambda each: each.step_time, lambda each: each.layout)


CASES = ((LLAMA_13B, 64, 2048), (LLAMA_13B, 128, 8192), (LLAMA_30B, 256, 2048))


@pytest.mark.parametrize(("made", "ranks", "length"), CASES)
def test_a_micro_batch_of_one_wins(made: Model, ranks: int, length: int) -> None:
    """It needs the least memory, and so the least model parallelism."""
    fitting = grid(made, ranks, length=length)
    assert fitting[0].layout.micro_batch == 1
    least = {
        size: min(
            e.layout.tp * e.layout.pp
            for e in fitting
            if e.layout.micro_batch == size and e.layout.recompute == "none"
        )
        for size in (1, 2)
    }
    assert least[1] <= least[2]


@pytest.mark.parametrize(("made", "ranks", "length"), CASES)
def test_no_recomputation_wins_where_it_fits(made: Model, ranks: int, length: int) -> None:
    """More model parallelism costs less than computing activations again."""
    fitting = grid(made, ranks, length=length)
    assert fitting[0].layout.recompute == "none"
    again = next(each for each in fitting if each.layout.recompute == "full")
    assert again.step_time > fitting[0].step_time


@pytest.mark.parametrize(("made", "ranks", "length"), CASES)
def test_recomputation_costs_less_than_the_third_it_repeats(
    made: Model, ranks: int, length: int
) -> None:
    layout = study(ranks, length=length, tp=2, pp=2)
    plain = estimate(made, cluster(), layout).step_time
    again = estimate(made, cluster(), replace(layout, recompute="full")).step_time
    assert 1.15 < again / plain < 1.4


@pytest.mark.parametrize(
    ("made", "ranks", "length"),
    [(LLAMA_13B, 64, 8192), (LLAMA_30B, 256, 2048), (LLAMA_65B, 128, 2048)],
)
@pytest.mark.parametrize("product_of_both", [4, 8])
def test_pipeline_before_tensor_parallelism(
    made: Model, ranks: int, length: int, product_of_both: int
) -> None:
    """At an equal product the layout with the longer pipeline is faster."""
    times = [
        estimate(made, cluster(), study(ranks, length=length, tp=tp, pp=product_of_both // tp))
        for tp in (1, 2, 4, 8)
        if tp <= product_of_both
        and made.query_heads % tp == 0
        and product_of_both // tp <= 4
        and made.layers % (product_of_both // tp) == 0
    ]
    seconds = [each.step_time for each in times]
    assert seconds == sorted(seconds)
    assert len(seconds) >= 2


def test_tp_sp_matters_for_large_models_and_long_sequences() -> None:
    """Up to 30B parameters and 2K tokens it changes little; above it decides."""

    def gain(made: Model, ranks: int, length: int, tp: int, pp: int) -> float:
        layout = study(ranks, length=length, tp=tp, pp=pp)
        without = estimate(made, cluster(), layout)
        with_it = estimate(made, cluster(), replace(layout, tp_sp=True))
        assert with_it.peak_memory < without.peak_memory
        return without.step_time / with_it.step_time - 1

    small = gain(LLAMA_13B, 32, 2048, 2, 1)
    assert 0 <= small < 0.05
    assert gain(LLAMA_13B, 64, 8192, 8, 1) > 0.05
    assert gain(LLAMA_65B, 128, 2048, 8, 2) > small
    # the memory that it frees lets the largest models do with fewer ranks a replica
    plain = grid(LLAMA_65B, 128, tp=(2, 4, 8), pp=(2, 4, 8), micro_batch=(1,), recompute=("none",))
    freed = grid(
        LLAMA_65B, 128, tp=(2, 4, 8), pp=(2, 4, 8), micro_batch=(1,), recompute=("none",),
        tp_sp=(True,),
    )  # fmt: skip
    assert len(freed) >= len(plain)
    assert freed[0].step_time <= plain[0].step_time


def test_flash_attention_and_fused_norms_save_time_and_memory() -> None:
    """Each step from plain torch to fused kernels is faster and smaller."""
    layout = study(64, tp=2, pp=2)
    chain = [
        replace(layout, kernel="torch", fused_norm=False),
        replace(layout, kernel="fused", fused_norm=False),
        replace(layout, kernel="flash1", fused_norm=False),
        replace(layout, kernel="flash2", fused_norm=False),
        layout,
    ]
    found = [estimate(LLAMA_13B, cluster(), each) for each in chain]
    times = [each.step_time for each in found]
    assert times == sorted(times, reverse=True)
    sizes = [each.peak_memory for each in found]
    assert sizes == sorted(sizes, reverse=True)


def test_fused_norms_let_the_13b_model_train_without_model_parallelism() -> None:
    """The study's fastest layout of 64 GPUs: TP 1, PP 1, micro-batch 1, no recomputation."""
    fitting = grid(LLAMA_13B, 64)
    best = fitting[0].layout
    assert (best.tp, best.pp, best.micro_batch, best.recompute) == (1, 1, 1, "none")
    unfused = estimate(LLAMA_13B, cluster(), replace(best, fused_norm=False))
    assert not unfused.fits


def test_efficiency_falls_with_size() -> None:
    assert grid(LLAMA_13B, 64)[0].mfu > grid(LLAMA_30B, 256)[0].mfu
