# SPDX-License-Identifier: Apache-2.0
"""Closed forms of attention over the SP axis against replayed schedules."""

from __future__ import annotations

import pytest

from megatron_seqpar.attention.schedules import build_schedule
from megatron_seqpar.planner import Layout
from megatron_seqpar.planner.attention import attention_time
from megatron_seqpar.planner.hardware import Cluster
from megatron_seqpar.simulate import load_cluster, predict

from .models import model


def both(name: str, sp: int, length: int, schedule: str) -> float:
    """Seconds of both passes by the closed form, on the cluster as it is described."""
    machine = load_cluster("dgx-h100")
    described = Cluster(machine=machine, capacity=machine.ranks_per_node)
    layout = Layout(length, 1, sp=sp, schedule=schedule)
    forward = attention_time(model(name), described, layout, "forward")
    total = forward + attention_time(model(name), described, layout, "backward")
    return total.compute + total.exposed


@pytest.mark.parametrize("schedule", ["balanced", "zigzag", "ring", "allgather", "ulysses"])
@pytest.mark.parametrize("name", ["llama2-7b", "llama3-8b"])
@pytest.mark.parametrize(("sp", "length"), [(4, 65536), (8, 65536), (8, 262144), (16, 524288)])
def test_close_to_the_replayed_schedule(schedule: str, name: str, sp: int, length: int) -> None:
    made = model(name)
    built = build_schedule(
        schedule,
        size=sp,
        seq_length=length,
        query_heads=made.query_heads,
        kv_heads=made.kv_heads,
        node_size=min(sp, 8),
    )
    machine = load_cluster("dgx-h100").with_ranks_per_node(min(sp, 8))
    replayed = predict(built, machine).total_s
    assert both(name, sp, length, schedule) == pytest.approx(replayed, rel=0.17)
