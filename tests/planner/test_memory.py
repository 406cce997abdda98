# SPDX-License-Identifier: Apache-2.0
"""Bytes: what layers keep equals the formulas that are held to autograd, and weights add up."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.planner_memory import predicted
from megatron_seqpar.memory.sizes import FULL, Activations
from megatron_seqpar.mfu import model_from_flags
from megatron_seqpar.planner import Constants, Layout
from megatron_seqpar.planner.launch import layout_flags
from megatron_seqpar.planner.memory import in_flight, stage_memory
from megatron_seqpar.planner.memory_kernels import CPU, PLAIN
from megatron_seqpar.planner.memory_layer import kept_per_layer, layer_moment, loss_moment
from megatron_seqpar.planner.sizes import stage_weights

from .models import LLAMA_13B, model, study

CONSTANTS = Constants()
BATCH = 28  # bytes a token: token, label, position, loss mask
NAMES = ("llama2-7b", "llama3-8b", "qwen3-8b")


def activations(name: str, layout: Layout) -> Activations:
    """The same layout as the formulas of the memory room see it."""
    made = model(name)
    down = made.ffn // layout.tp
    return Activations(
        tokens=int(layout.tokens),
        layers=1,
        element=2,
        hidden=made.hidden,
        query=made.query_heads * made.head_dim // layout.tp,
        key_value=2 * made.kv_heads * made.head_dim // layout.tp,
        heads=made.query_heads // layout.tp,
        mlp_up=2 * down,
        mlp_down=down,
        vocabulary=made.vocab // layout.tp,
        shared=layout.tp if layout.tp_sp else 1,
        sums=False,
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("recompute", ["none", "mlp", "attention-qkv", "attention-output", "full"])
@pytest.mark.parametrize(("tp", "tp_sp", "sp"), [(1, False, 1), (4, True, 1), (2, False, 4)])
def test_what_layers_keep_is_what_autograd_saves(
    name: str, recompute: str, tp: int, tp_sp: bool, sp: int
) -> None:
    """And so say the memory room's formulas, which leave out the batch itself."""
    layout = Layout(8192, 64, tp=tp, sp=sp, tp_sp=tp_sp, recompute=recompute)
    known = activations(name, layout)
    text = FULL if recompute == "full" else recompute
    kept = kept_per_layer(model(name), layout, CONSTANTS)
    assert kept == pytest.approx(known.kept_per_layer(text), rel=1e-6)
    moment = layer_moment(model(name), layout, CONSTANTS)
    assert moment == pytest.approx(known.layer_moment(text) + BATCH * layout.tokens, rel=1e-6)
    split = replace(known, split_gate=True)
    kept = kept_per_layer(model(name), layout, CONSTANTS, PLAIN)
    assert kept == pytest.approx(split.kept_per_layer(text), rel=1e-6)


@pytest.mark.parametrize("pieces", [0, 1, 8])
def test_pieces_shrink_the_moments_as_they_do_there(pieces: int) -> None:
    layout = Layout(8192, 64, mlp_chunks=pieces, loss_chunks=pieces)
    made = model("llama3-8b")
    known = activations("llama3-8b", layout)
    kept = kept_per_layer(made, layout, CONSTANTS)
    assert kept == pytest.approx(known.kept_per_layer("none", pieces), rel=1e-6)
    moment = layer_moment(made, layout, CONSTANTS)
    assert moment == pytest.approx(known.layer_moment("none", pieces) + BATCH * 8192, rel=1e-6)
    loss = loss_moment(made, layout, CONSTANTS)
    assert loss == pytest.approx(known.loss_moment(pieces) + BATCH * 8192, rel=1e-6)


@pytest.mark.parametrize("name", ["llama3-8b", "mixtral-8x7b", "gemma2-9b"])
def test_the_weights_of_all_ranks_are_the_models(name: str) -> None:
    made = model(name)
    layout = Layout(4096, 64, tp=2, pp=2, dp=2, ep=2 if made.experts else 1)
    held = [stage_weights(made, layout, stage) for stage in range(2)]
    dense = 2 * sum(each.dense for each in held)
    experts = 2 * layout.ep * sum(each.experts for each in held)
    tied = made.vocab * made.hidden if made.tied else 0  # on the first and on the last stage
    assert dense + experts == pytest.approx(made.parameters + tied, rel=1e-9)


RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
PIECES = {"mlp_chunks": 8, "loss_chunks": 8}
WAYS: dict[str, dict[str, Any]] = {
    "stock": {"kernel": "torch"},
    "stock, full recompute": {"kernel": "torch", "recompute": "full"},
    "none": {},
    "full recompute": {"recompute": "full"},
    "attention-output": {"recompute": "attention-output"},
    "full recompute + mini-sequence": {"recompute": "full", **PIECES},
    "attention-output + mini-sequence": {"recompute": "attention-output", **PIECES},
}
EXACT = CONSTANTS.changed({"activation_slack": 1.0, "context_bytes": 1.0, "flight_slack": 0.0})
"""Nothing for what a GPU's context and allocator take."""


@pytest.mark.parametrize(("file", "ranks"), [("memory", 1), ("memory_2_ranks", 2)])
@pytest.mark.parametrize("way", WAYS)
def test_within_10_percent_of_measured_peaks(file: str, ranks: int, way: str) -> None:
    """What a step adds, by the allocator's account of runs on a CPU in fp32."""
    measured = json.loads((RESULTS / f"{file}.json").read_text(encoding="utf-8"))
    flags = measured["model"]
    made = model_from_flags({**flags, "vocab-size": flags["make-vocab-size-divisible-by"]})
    for tokens, row in measured["by_ranks"][str(ranks)].items():
        peak = row["ways"].get(way, {}).get("allocator_peak_bytes")
        if peak is None:
            continue  # stock attention was too large, or was not run on two ranks
        layout = Layout(int(tokens), 1, sp=ranks, element=4, **WAYS[way])
        held = stage_memory(made, layout, EXACT, 0, CPU)
        assert held.activations + held.moment == pytest.approx(peak, rel=0.1), tokens


def test_within_10_percent_of_whole_ranks() -> None:
    """Weights, gradients, optimizer state and activations of the fullest rank, by layout."""
    measured = json.loads((RESULTS / "planner_memory.json").read_text(encoding="utf-8"))
    assert len(measured["rows"]) > 20
    for row in measured["rows"]:
        layout = Layout(**row["layout"])
        assert layout_flags(layout) == row["flags"], "it ran with other flags than are printed now"
        held = sum(predicted({**measured["model"]["flags"], **row["changes"]}, layout).values())
        assert held == pytest.approx(row["peak_bytes"], rel=0.1), row["name"]


def test_in_flight_micro_batches() -> None:
    plain = Layout(2048, 64, pp=4)
    assert [in_flight(plain, stage) for stage in range(4)] == [4, 3, 2, 1]
    assert in_flight(replace(plain, global_batch=2), 0) == 2
    # interleaved: 2 x 3 + 1 x 4 + 1 chunks of half a stage
    assert in_flight(replace(plain, vpp=2), 0) == 5.5
    assert in_flight(replace(plain, vpp=2), 3) == 2.5


def test_zero_stages_shard_one_component_after_the_other() -> None:
    made, replicas = LLAMA_13B, 64
    count = made.parameters
    held = [
        stage_memory(made, Layout(2048, 2048, dp=replicas, zero=zero), CONSTANTS, 0)
        for zero in range(4)
    ]
    assert [each.optimizer / count for each in held] == pytest.approx([12, *[12 / replicas] * 3])
    assert [each.gradients / count for each in held] == pytest.approx([4, 4, *[4 / replicas] * 2])
    assert [each.weights / count for each in held] == pytest.approx([2, 2, 2, 2 / replicas])


def test_a_plain_softmax_keeps_all_scores_and_recomputation_drops_them() -> None:
    layout = study(64, kernel="torch")
    flash = stage_memory(LLAMA_13B, study(64), CONSTANTS, 0)
    plain = stage_memory(LLAMA_13B, layout, CONSTANTS, 0)
    scores = 40 * 40 * 2048**2 * CONSTANTS.torch_kept * CONSTANTS.activation_slack
    assert plain.activations - flash.activations == pytest.approx(scores)
    again = stage_memory(LLAMA_13B, replace(layout, recompute="selective"), CONSTANTS, 0)
    assert again.activations == pytest.approx(flash.activations)
