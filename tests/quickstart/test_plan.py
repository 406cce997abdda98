# SPDX-License-Identifier: Apache-2.0
"""The ways that the quickstart compares."""

from megatron_seqpar.compare.config import CompareConfig
from megatron_seqpar.compare.ways import Way
from megatron_seqpar.compare.ways import ways as ways_of
from megatron_seqpar.mfu import load_model
from megatron_seqpar.quickstart.__main__ import ways
from megatron_seqpar.shipped import model_file


def compared(ranks: int) -> list[Way]:
    model = model_file("quickstart")
    config = CompareConfig(
        model=model, seq_length=(8192,), ranks=ranks, ways=ways(ranks, "ring"),
        changes={"vocab-size": 256},
    )  # fmt: skip
    sizes = load_model(model_file("llama2-7b-gqa"))  # 8 KV heads
    return ways_of(config, sizes, "cpu", has_te=False)


def test_two_ranks() -> None:
    found = compared(2)
    assert [(way.label, way.layout.ranks) for way in found] == [
        ("SP=2", 2),
        ("SP=1", 1),
        ("TP=2 + TP-SP", 2),
        ("TP=2 + TP-SP, stock", 2),
    ]
    assert found[0].layout.schedule == "ring"
    assert [way.layout.kernel for way in found] == ["cpu", "cpu", "cpu", "stock"]


def test_one_rank_has_nothing_to_split() -> None:
    assert [way.label for way in compared(1)] == ["SP=1"]
