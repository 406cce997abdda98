# SPDX-License-Identifier: Apache-2.0
"""Step times: parts add up, and move the way that physics says."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_seqpar.mfu import model_flops
from megatron_seqpar.planner import Layout, estimate
from megatron_seqpar.planner.compute import gemm_seconds
from megatron_seqpar.planner.estimate import peak_memory
from megatron_seqpar.planner.squeeze import squeeze

from .models import LLAMA_13B, LLAMA_30B, cluster, model, study


def test_parts_add_up_and_mfu_is_the_one_formula() -> None:
    layout = Layout(8192, 256, tp=2, sp=2, pp=2, dp=8, tp_sp=True)
    one = estimate(model("llama3-8b"), cluster(), layout)
    parts = [getattr(one.time, name) for name in one.time.__dataclass_fields__]
    assert all(part >= 0 for part in parts)
    assert sum(parts) == pytest.approx(one.step_time)
    flops = model_flops(model("llama3-8b"), 8192, 256)
    assert one.mfu == pytest.approx(flops / (one.step_time * 64 * 312e12))


@settings(max_examples=60, deadline=None)
@given(
    tp=st.sampled_from((1, 2, 4, 8)),
    pp=st.sampled_from((1, 2, 4)),
    dp=st.sampled_from((1, 2, 8)),
    micro=st.sampled_from((1, 2)),
    recompute=st.sampled_from(("none", "mlp", "attention-qkv", "attention-output", "full")),
)
def test_no_layout_beats_the_peak_or_takes_less_than_its_parts(
    tp: int, pp: int, dp: int, micro: int, recompute: str
) -> None:
    layout = Layout(8192, 64, tp=tp, pp=pp, dp=dp, micro_batch=micro, recompute=recompute)
    one = estimate(model("llama3-8b"), cluster(), layout)
    assert 0 < one.mfu < 1
    assert one.peak_memory > 0
    # more micro-batches take longer, more replicas shorter
    twice = estimate(model("llama3-8b"), cluster(), replace(layout, global_batch=128))
    assert twice.step_time > one.step_time
    wider = estimate(model("llama3-8b"), cluster(), replace(layout, dp=2 * dp))
    assert wider.time.compute == pytest.approx(one.time.compute / 2)


def test_thin_products_are_slow() -> None:
    whole = gemm_seconds(cluster(), 4096, 4096, 4096)
    thin = gemm_seconds(cluster(), 4096, 512, 4096)
    assert thin > whole / 8 * 1.1


def test_the_bubble_is_that_of_1f1b() -> None:
    """(pp - 1) / micro-batches of the compute, without the LM head's imbalance."""
    small_head = replace(LLAMA_13B, vocab=64)
    layout = study(64, tp=2, pp=4)
    time = estimate(small_head, cluster(), layout).time
    busy = time.gemm + time.attention + time.elementwise + time.overhead + time.tp
    assert time.bubble / busy == pytest.approx(3 / layout.micro_batches, rel=0.02)
    interleaved = estimate(small_head, cluster(), replace(layout, vpp=2)).time
    assert interleaved.bubble == pytest.approx(time.bubble / 2)


def test_the_last_stage_waits_for_nobody_and_is_waited_for() -> None:
    """A vocabulary of 128,000 makes the last of four stages the slowest."""
    layout = study(64, tp=2, pp=4)
    large = estimate(LLAMA_13B, cluster(), layout)
    small = estimate(replace(LLAMA_13B, vocab=64), cluster(), layout)
    assert large.time.gemm / small.time.gemm == pytest.approx(1 + 0.655 / 3.17, rel=0.1)


def test_finer_recomputation_costs_less() -> None:
    layout = Layout(32768, 32, sp=4, dp=2)
    times = [
        estimate(model("llama3-8b"), cluster(), replace(layout, recompute=name)).step_time
        for name in ("none", "mlp", "attention-qkv", "attention-output", "full")
    ]
    assert times == sorted(times)
    kept = [
        estimate(model("llama3-8b"), cluster(), replace(layout, recompute=name)).peak_memory
        for name in ("none", "mlp", "attention-qkv", "attention-output", "full")
    ]
    assert kept == sorted(kept, reverse=True)


def test_a_reduction_through_copies_takes_longer_where_memory_is_short() -> None:
    """The copies need blocks as large as the weights; kept activations are many small ones."""
    roomy = study(256, tp=4, pp=1, recompute="full", copied_reduction=True)
    assert squeeze(LLAMA_30B, cluster(), roomy) == 0
    # logits of more sequences fill the memory too, but with blocks that the copies can use
    logits = replace(roomy, micro_batch=4)
    assert peak_memory(LLAMA_30B, cluster(), logits) > 0.8 * cluster().capacity.value
    assert squeeze(LLAMA_30B, cluster(), logits) < 0.2
    full = replace(roomy, recompute="none", fused_norm=False)
    assert peak_memory(LLAMA_30B, cluster(), full) < peak_memory(LLAMA_30B, cluster(), logits)
    assert squeeze(LLAMA_30B, cluster(), full) > 0.5
    times = [
        estimate(LLAMA_30B, cluster(), layout).time.dp
        for layout in (roomy, full, replace(full, copied_reduction=False))
    ]
    assert times[0] == times[2] < times[1]
    assert times[1] / times[0] < 1.01 + cluster().constants.dp_squeeze
