# SPDX-License-Identifier: Apache-2.0
"""Rows as Calculon and llm-analysis get them, and factors fitted to the other sheets.

The tools themselves are not needed: what they are asked is plain data.
"""

from __future__ import annotations

import pytest

from benchmarks.baseline_tools import (
    Answer,
    calculon_application,
    calculon_execution,
    llm_analysis_model,
    llm_analysis_parallelism,
    llm_analysis_training,
)
from benchmarks.planner_baselines import memory_factor, own_regret, predictions, time_factor
from megatron_seqpar.planner.runs import Run, run_of

ROW = {
    "model": "llama_13B", "layers": "40", "hidden": "5120", "heads": "40", "ffn": "13824",
    "seq_len": "2048", "global_batch": "2048", "world_size": "64", "tp": "2", "pp": "2",
    "micro_batch": "4", "status": "ok", "step_time_s": "30",
    "kernel": "flash_attention2 + RMS kernel", "act_ckpt": "none", "seq_parallel": "True",
}  # fmt: skip


def run(**changes: object) -> Run:
    return run_of({**ROW, **{name: str(value) for name, value in changes.items()}}, "sheet")


def test_a_gated_mlp_keeps_its_weights_in_calculon() -> None:
    model = run().model
    told = calculon_application(model, 2048)
    plain = told["hidden"] * (2 * told["feedforward"] + 4 * told["attn_heads"] * told["attn_size"])
    assert plain * told["num_blocks"] == model.parameters - model.embedding_parameters
    assert (told["seq_size"], told["num_blocks"]) == (2048, 40)


@pytest.mark.parametrize(
    ("kernel", "checkpointing", "recompute"),
    [
        ("flash_attention2 + RMS kernel", "none", "attn_only"),
        ("flash_attentionv1.0.8", "none", "attn_only"),
        ("fused", "none", "none"),
        ("torch", "none", "none"),
        ("torch", "every_layer", "full"),
        ("flash_attention2", "every_layer", "full"),
    ],
)
def test_calculon_is_told_what_attention_keeps(
    kernel: str, checkpointing: str, recompute: str
) -> None:
    told = calculon_execution(run(kernel=kernel, act_ckpt=checkpointing).layout)
    assert told["activation_recompute"] == recompute


@pytest.mark.parametrize(
    ("tp", "pp", "split", "networks", "communication"),
    [
        (2, 2, True, (0, 1, 1), "rs_ag"),
        (2, 2, False, (0, 1, 1), "ar"),
        (1, 4, True, (0, 1, 1), "ar"),
        (4, 16, True, (0, 1, 0), "rs_ag"),  # tp x dp = 4: both in a node
    ],
)
def test_calculon_is_told_where_ranks_lie(
    tp: int, pp: int, split: bool, networks: tuple[int, int, int], communication: str
) -> None:
    told = calculon_execution(run(tp=tp, pp=pp, seq_parallel=split).layout)
    found = (told["tensor_par_net"], told["pipeline_par_net"], told["data_par_net"])
    assert found == networks
    assert told["tensor_par_comm_type"] == communication
    assert told["num_procs"] == told["tensor_par"] * told["pipeline_par"] * told["data_par"]
    assert told["optimizer_sharding"] == (told["data_par"] > 1)


def test_what_llm_analysis_is_told() -> None:
    one = run(kernel="torch", seq_parallel="False", act_ckpt="every_layer")
    told = llm_analysis_model(one.model, 2048)
    assert (told["ffn_embed_dim"], told["mlp_gated_linear_units"]) == (13824, True)
    assert told["vocab_size"] == 128_000
    assert llm_analysis_parallelism(one.layout) == {
        "tp_size": 2, "pp_size": 2, "dp_size": 16, "sp_size": 1,
    }  # fmt: skip
    assert llm_analysis_training(one.layout) == {
        "batch_size_per_gpu": 4,
        "global_batch_size": 2048,
        "seq_len": 2048,
        "activation_recomputation": 4,
        "ds_zero": 1,
        "layernorm_dtype_bytes": 4,
        "master_weights_dtype_bytes": 2,
        "flash_attn": False,
    }
    fused = run()
    assert llm_analysis_parallelism(fused.layout)["sp_size"] == 2
    assert llm_analysis_training(fused.layout)["layernorm_dtype_bytes"] == 2
    assert llm_analysis_training(fused.layout)["flash_attn"] is True


def test_factors_and_the_pick_of_least_time() -> None:
    """A tool that is off by constant factors is right once they are known."""
    rows = [
        (30.0, 40, "ok"), (20.0, 60, "ok"), (25.0, 50, "ok"), (1.0, 90, "oom"), (2.0, 85, "oom"),
    ]  # fmt: skip
    asked = [
        (run(status=status, step_time_s=time if status == "ok" else ""), Answer(held / 2, time / 3))
        for time, held, status in rows
    ]
    assert time_factor(asked) == pytest.approx(3)
    factor = memory_factor(asked, 80.0)
    assert 80 / 42.5 < factor < 80 / 30
    plain = predictions(asked, 80.0)
    assert all(each.fits for each in plain)
    assert own_regret(plain) == (0.0, True)  # the least time ran out; of those that ran, the best
    better = predictions(asked, 80.0, 3.0, factor)
    assert [each.fits for each in better] == [True, True, True, False, False]
    assert [each.time for each in better[:3]] == pytest.approx([30, 20, 25])
    assert own_regret(better) == (0.0, False)
    assert own_regret(predictions([(run(), None)], 80.0)) == (None, None)
