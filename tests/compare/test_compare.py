# SPDX-License-Identifier: Apache-2.0
"""What a comparison runs, and how it judges what came of it."""

import pytest

from megatron_seqpar.compare.config import CompareConfig
from megatron_seqpar.compare.result import judge, notes
from megatron_seqpar.compare.table import cost_table, traffic_table
from megatron_seqpar.compare.ways import padded_heads, ways
from megatron_seqpar.experiments.layout import Layout
from megatron_seqpar.experiments.peaks import peak_of_rows
from megatron_seqpar.mfu import Peak, model_flops, model_from_flags

SIZES = {"num-layers": 2, "hidden-size": 64, "num-attention-heads": 8, "vocab-size": 256}
MODEL = model_from_flags(SIZES)


def config(**changes) -> CompareConfig:
    return CompareConfig.model_validate({"model": "m.yaml", "seq_length": 64, **changes})


def labels(model=MODEL, te=False, **changes) -> list[str]:
    return [way.label for way in ways(config(**changes), model, "cpu", has_te=te)]


def test_ways_of_two_ranks():
    assert labels() == [
        "SP=1",
        "SP=2",
        "TP=2",
        "TP=2 + TP-SP",
        "SP=1, stock",
        "TP=2, stock",
        "TP=2 + TP-SP, stock",
        "CP=2, stock",
    ]


def test_ways_of_more_ranks_mix_tp_and_sp():
    found = labels(ranks=8)
    assert "TP=2 x SP=4 + TP-SP" in found
    assert "TP=4 x SP=2 + TP-SP" in found


def test_cp_without_transformer_engine_is_a_row_that_says_so():
    (cp,) = (way for way in ways(config(), MODEL, "cpu", has_te=False) if way.layout.cp > 1)
    assert "needs Transformer Engine" in cp.unavailable
    (cp,) = (way for way in ways(config(), MODEL, "aten", has_te=True) if way.layout.cp > 1)
    assert not cp.unavailable


def test_stock_megatron_is_left_out_where_it_lacks_the_recomputation():
    assert not any("stock" in label for label in labels(recompute="attention-output"))
    full = ways(config(recompute="full"), MODEL, "cpu", has_te=False)
    assert all(way.layout.recompute == "full" for way in full)


def test_33_heads_are_padded_for_tp_alone():
    model = model_from_flags({**SIZES, "hidden-size": 33 * 8, "num-attention-heads": 33})
    by_label = {way.label: way for way in ways(config(), model, "cpu", has_te=False)}
    assert not by_label["SP=2"].changes
    padded = by_label["TP=2 (padded to 34 heads)"]
    assert padded.changes == {
        "num-attention-heads": 34,
        "kv-channels": 8,
        "group-query-attention": True,
        "num-query-groups": 34,
    }
    assert "another model" in padded.note
    changed = model_from_flags({**SIZES, "hidden-size": 33 * 8, **padded.changes})
    assert Layout(2, tp=2).impossible(changed, 2) is None
    assert changed.head_dim == model.head_dim


@pytest.mark.parametrize(
    ("heads", "kv", "tp", "padded"),
    [(33, 33, 8, (40, 40)), (32, 1, 8, None), (32, 8, 8, None), (28, 4, 8, (32, 4)),
     (12, 3, 2, (16, 4)), (24, 3, 2, (32, 4)), (9, 3, 3, None)],
)  # fmt: skip
def test_padded_heads_divide(heads, kv, tp, padded):
    sizes = {**SIZES, "num-attention-heads": heads, "num-query-groups": kv, "kv-channels": 8}
    model = model_from_flags(sizes)
    changes, note = padded_heads(model, tp)
    assert bool(changes) == bool(note) == (padded is not None)
    if padded is None:
        assert Layout(tp, tp=tp).impossible(model, tp) is None
    else:
        changed = model_from_flags({**sizes, **changes})
        assert Layout(tp, tp=tp).impossible(changed, tp) is None
        assert (changed.query_heads, changed.kv_heads) == padded


def test_ways_of_the_file():
    asked = [
        {"tp": 2, "label": "mine", "arguments": {"bf16": True}},
        {"ranks": 1, "kernel": "stock"},
    ]
    first, second = ways(config(ways=asked), MODEL, "cpu", has_te=False)
    assert (first.label, first.layout.tp, first.extra) == ("mine", 2, {"bf16": True})
    assert (second.label, second.layout.kernel) == ("SP=1, stock", "stock")


def row(label: str, seconds: float | None, losses=(2.0, 1.0), **changes):
    """A stored row."""
    layout = {"sp": 2 if label.startswith("SP=2") else 1}
    common = {"label": label, "attention": "", "ranks": 2, "changes": {}, "note": "", "reason": "",
              "layout": layout}  # fmt: skip
    if seconds is None:
        return {**common, "status": "oom", "reason": "no memory\nfor it", **changes}
    measured = {
        "status": "ok",
        "step_time_s": seconds,
        "step_time_spread": 0.1,
        "seconds": [seconds],
        "tokens_per_s": 64 / seconds,
        "losses": list(losses),
        "device": {"kind": "cpu", "name": "CPU", "threads": 1},
        "dtype": "float32",
        "peak_flops_per_rank": 1e9,
        "peak_memory_bytes": 2**20,
        "memory_since_start_bytes": 2**19,
        "bytes_sent_per_step": 2**20,
        "bytes_by_kind": {"send": 2**20},
    }
    return {**common, **measured, **changes}


def test_rows_are_judged_against_one_rank_and_sp():
    rows = [
        row("SP=1", 4.0, ranks=1),
        row("SP=2", 2.0, (2.0, 1.001)),
        row("TP=2", 3.0, (2.0, 1.0)),
        row("TP=2, padded", 3.0, (5.0, 4.0), changes={"num-attention-heads": 34}),
        row("TP=2, stock", None),
    ]
    peak = peak_of_rows(rows, None)
    assert peak == Peak(1e9, "measured", peak.source)
    judged = judge(rows, MODEL, 64, 1, peak)
    assert [r["reference"] for r in judged] == [True, False, False, False, False]
    assert [r["time_over_sp"] for r in judged] == [None, 1.0, 1.5, 1.5, None]
    assert judged[1]["loss_difference"] == pytest.approx(1e-3)
    assert judged[2]["loss_difference"] == 0.0
    assert judged[3]["loss_difference"] is None, "another model"
    flops = model_flops(MODEL, 64, 1)
    assert judged[1]["mfu"] == pytest.approx(flops / (2.0 * 2 * 1e9))
    assert judged[0]["mfu"] == pytest.approx(flops / (4.0 * 1 * 1e9))
    assert judged[1]["causal_mfu"] < judged[1]["mfu"]
    table = cost_table(judged, "title")
    assert table.row_count == 5
    assert traffic_table(judged).row_count == 4


def test_a_loss_that_is_no_number_is_no_small_difference():
    judged = judge(
        [row("SP=1", 1.0, ranks=1), row("SP=2", 1.0, (2.0, float("nan")))], MODEL, 64, 1, None
    )
    assert judged[1]["loss_difference"] == float("inf")


def test_curves_of_different_lengths_are_not_compared():
    with pytest.raises(ValueError, match="1 steps against 2"):
        judge([row("SP=1", 1.0, ranks=1), row("SP=2", 1.0, (2.0,))], MODEL, 64, 1, None)


def test_no_reference_no_difference():
    (only,) = judge([row("SP=2", 1.0)], MODEL, 64, 1, None)
    assert (only["loss_difference"], only["mfu"]) == (None, None)


def test_without_one_rank_the_first_way_is_the_reference():
    """A model that does not fit one GPU still has losses to compare."""
    rows = [row("TP=2", 1.0, changes={"num-attention-heads": 2}), row("SP=2", 1.0), row("TP", 2.0)]
    padded, first, second = judge(rows, MODEL, 64, 1, None)
    assert [r["reference"] for r in (padded, first, second)] == [False, True, False]
    assert (padded["loss_difference"], second["loss_difference"]) == (None, 0.0)


def test_what_makes_it_unfair_is_said():
    rows = [row("SP=1", 1.0, ranks=1), row("SP=2", 1.0, note="padded", step_time_spread=0.5)]
    said = " ".join(notes(rows, None, "stock is unfused"))
    for words in ("padded", "stock is unfused", "1 thread(s) a rank", "no MFU", "not quiet"):
        assert words in said
