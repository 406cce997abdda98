# SPDX-License-Identifier: Apache-2.0
"""`--seqpar-trace`, the scalars and the report's attention numbers, of real runs."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from megatron_seqpar.attention import Causal, Schedule, build_schedule
from megatron_seqpar.errors import SeqParError
from megatron_seqpar.telemetry import trace as files
from tests.integration.runs import launch, trained

pytest.importorskip("megatron.training")

from megatron_seqpar.integration import steps, tensorboard, trace

LAYERS, MICROBATCHES, RANKS, SEQ, TRACED = 2, 4, 2, 96, 2  # of tests.integration.runs
SP2 = ("--sequence-parallel-size", str(RANKS), "--seqpar-schedule", "balanced")
CALLS = LAYERS * MICROBATCHES


@pytest.fixture(scope="module")
def schedule() -> Schedule:
    """That of one attention call of the runs below."""
    return build_schedule(
        "balanced",
        size=RANKS,
        seq_length=SEQ,
        mask=Causal(),
        query_heads=4,
        kv_heads=2,
        head_dim=16,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a run of three steps put its trace of the second, its report and its scalars."""
    folder = tmp_path_factory.mktemp("traced")
    stale = files.rank_path(folder / "trace" / "step-000002", 7)
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"of an earlier run with more ranks")
    arguments = ["--seqpar-trace", str(folder / "trace"), "--seqpar-trace-steps", str(TRACED)]
    arguments += ["--seqpar-report", str(folder / "report.json")]
    arguments += ["--tensorboard-dir", str(folder / "scalars")]
    run = trained(launch(RANKS, *SP2, *arguments))
    assert run.text.count("step 2 traced") == 1
    return folder


@pytest.fixture(scope="module")
def content(folder: Path) -> dict[str, Any]:
    assert [path.name for path in sorted((folder / "trace").iterdir())] == ["step-000002"]
    return files.read(files.merged_path(folder / "trace" / "step-000002"))


def bars(content: dict[str, Any], kind: str, rank: int | None = None) -> list[dict[str, Any]]:
    return [
        event
        for event in content["traceEvents"]
        if event["ph"] == "X"
        and event["args"]["kind"] == kind
        and (rank is None or event["pid"] == rank)
    ]


def test_every_tile_of_every_call_is_there(content, schedule):
    for rank in range(RANKS):
        tiles = [tile for step in schedule.steps(rank) for tile in step.tiles]
        planned = Counter((str(tile.q), str(tile.kv)) for tile in tiles for _ in range(CALLS))
        for direction in ("forward", "backward"):
            seen = Counter(
                (bar["args"]["q"], bar["args"]["kv"])
                for bar in bars(content, "tile", rank)
                if bar["args"]["direction"] == direction
            )
            assert seen == planned
    assert content["otherData"]["ranks"] == RANKS  # and not those of the earlier run


def test_layers_and_microbatches_are_marked(content):
    for rank in range(RANKS):
        for direction in ("forward", "backward"):
            calls = [
                (bar["args"]["layer"], bar["args"]["microbatch"])
                for bar in bars(content, "call", rank)
                if bar["args"]["direction"] == direction
            ]
            assert sorted(calls) == sorted(
                (layer + 1, number) for layer in range(LAYERS) for number in range(MICROBATCHES)
            )


def test_calls_lie_in_their_microbatch_and_microbatches_in_the_step(content):
    def inside(inner: dict[str, Any], outer: dict[str, Any]) -> bool:
        # times are floats of microseconds
        end = inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"] + 0.01
        return bool(inner["ts"] >= outer["ts"] - 0.01 and end)

    for rank in range(RANKS):
        (step,) = bars(content, "iteration", rank)
        assert step["name"] == f"iteration {TRACED}"
        parts = {
            (bar["args"]["direction"], bar["args"]["microbatch"]): bar
            for bar in bars(content, "micro-batch", rank)
        }
        assert len(parts) == 2 * MICROBATCHES
        assert all(inside(part, step) for part in parts.values())
        for call in bars(content, "call", rank):
            facts = call["args"]
            assert inside(call, parts[facts["direction"], facts["microbatch"]])


def test_bytes_of_the_trace_are_the_schedules(content, schedule):
    for rank in range(RANKS):
        planned = sum(
            schedule.bytes_sent(rank, direction, "float32") for direction in ("forward", "backward")
        )
        sends = bars(content, "send", rank)
        assert sum(bar["args"]["bytes"] for bar in sends) == CALLS * planned
        assert all(bar["args"]["peer"] == 1 - rank for bar in sends)


def test_every_message_has_its_arrow_and_arrives_after_it_was_posted(content):
    def around(end: dict[str, Any], kind: str) -> dict[str, Any]:
        (bar,) = [
            bar
            for bar in bars(content, kind, end["pid"])
            if bar["tid"] == end["tid"] and bar["ts"] <= end["ts"] <= bar["ts"] + bar["dur"]
        ]
        return bar

    starts, finishes = (
        {e["id"]: e for e in content["traceEvents"] if e["ph"] == phase} for phase in "sf"
    )
    assert set(starts) == set(finishes)
    assert len(starts) == len(bars(content, "send")) == len(bars(content, "receive")) > 0
    for number, start in starts.items():
        send, receive = around(start, "send"), around(finishes[number], "receive")
        for fact in ("payload", "tokens", "bytes", "layer", "microbatch", "step", "direction"):
            assert send["args"][fact] == receive["args"][fact]
        posted = send["ts"] - send["args"]["queued_us"]
        assert receive["ts"] + receive["dur"] >= posted - 1


def test_bars_of_one_link_follow_one_another(content):
    for kind in ("send", "receive"):
        for rank in range(RANKS):
            track = sorted((e["ts"], e["ts"] + e["dur"]) for e in bars(content, kind, rank))
            for (_, end), (begin, _) in pairwise(track):
                assert begin >= end - 0.01


def test_the_report_knows_waiting_computing_and_bytes(folder, schedule):
    report = json.loads((folder / "report.json").read_text())
    planned = sum(
        schedule.bytes_sent(rank, direction, "float32")
        for rank in range(RANKS)
        for direction in ("forward", "backward")
    )
    for step in report["steps"]:
        assert step["attention_bytes_sent"] == CALLS * planned
        assert 0 < step["attention_compute_seconds"] < step["seconds"]
        assert 0 < step["attention_wait_seconds"] < step["seconds"]
    assert report["summary"]["attention_wait_seconds_per_step"] > 0


def test_scalars_in_tensorboard_are_those_of_the_report(folder):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    events = event_accumulator.EventAccumulator(str(folder / "scalars"))
    events.Reload()
    found = {
        tag: {scalar.step: scalar.value for scalar in events.Scalars(tag)}
        for tag in events.Tags()["scalars"]
        if tag.startswith("seqpar/")
    }
    report = json.loads((folder / "report.json").read_text())
    assert len(found) == 3 * (2 + RANKS) + 3
    speed, mfu = found["seqpar/tokens_per_second"], found["seqpar/mfu"]
    assert (
        set(speed) == set(mfu) == set(found["seqpar/causal_mfu"]) == {1, 2}
    )  # by the next's start
    flops = report["summary"]["model_flops_per_step"] / report["steps"][0]["tokens"]
    peak = report["ranks"][-1]["peak"]["value"]  # of the rank that writes
    for at in (1, 2):
        assert mfu[at] == pytest.approx(speed[at] * flops / (RANKS * peak), rel=1e-4)
    for step in report["steps"]:
        at = step["iteration"]
        for name in ("attention_wait_seconds", "attention_compute_seconds"):
            value = found[f"seqpar/{name}/max"][at]
            assert value == pytest.approx(step[name], rel=1e-5)
        sent = sum(found[f"seqpar/attention_bytes_sent/rank{rank}"][at] for rank in range(RANKS))
        assert sent == step["attention_bytes_sent"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "repeats"),
    [
        pytest.param(("--seqpar-recompute", "attention-output"), False, id="ours"),
        pytest.param(
            (
                *("--recompute-granularity", "full", "--recompute-method", "uniform"),
                *("--recompute-num-layers", "1"),
            ),
            True,
            id="stock",
        ),
    ],
)
def test_attention_that_runs_again_is_seen(tmp_path, arguments, repeats):
    arguments = (*arguments, "--seqpar-trace", str(tmp_path), "--seqpar-trace-steps", "1")
    trained(launch(RANKS, *SP2, *arguments))
    content = files.read(files.merged_path(tmp_path / "step-000001"))
    directions = Counter(bar["args"]["direction"] for bar in bars(content, "call"))
    expected = {"forward": RANKS * CALLS, "backward": RANKS * CALLS}
    assert directions == expected | ({"recompute": RANKS * CALLS} if repeats else {})
    assert {bar["args"]["microbatch"] for bar in bars(content, "call")} == set(range(MICROBATCHES))


@pytest.mark.slow
def test_pipeline_stages_mark_their_own_layers(tmp_path):
    arguments = ("--pipeline-model-parallel-size", "2", "--seqpar-trace", str(tmp_path))
    trained(launch(2 * RANKS, *SP2, *arguments))
    content = files.read(files.merged_path(tmp_path / "step-000003"))
    for rank in range(2 * RANKS):
        layers = {bar["args"]["layer"] for bar in bars(content, "call", rank)}
        assert layers == {1 + rank // RANKS}
        peers = {bar["args"]["peer"] for bar in bars(content, "send", rank)}
        assert peers == {rank ^ 1}  # a global rank, of the same stage


def test_wraps_are_around_one_another_and_can_be_removed():
    seen = []

    def wrap(name):
        def build(original):
            def call(value):
                seen.append(name)
                return original(value)

            return call

        return build

    inner, outer = wrap("inner"), wrap("outer")
    step = steps.wrap_train_step(lambda value: value + 1)
    for added in (inner, outer, inner):
        steps.around("train_step", added)
    assert step(1) == 2
    assert seen == ["outer", "inner"]
    for removed in (inner, outer, outer):
        steps.remove("train_step", removed)
    seen.clear()
    assert step(1) == 2
    assert seen == []


def test_few_ranks_have_a_scalar_each_and_many_only_their_mean_and_largest():
    few = tensorboard.scalars([[1.0, 10.0], [3.0, 20.0]], ["wait", "bytes"])
    assert few == {
        "seqpar/wait/mean": 2.0,
        "seqpar/wait/max": 3.0,
        "seqpar/wait/rank0": 1.0,
        "seqpar/wait/rank1": 3.0,
        "seqpar/bytes/mean": 15.0,
        "seqpar/bytes/max": 20.0,
        "seqpar/bytes/rank0": 10.0,
        "seqpar/bytes/rank1": 20.0,
    }
    many = tensorboard.scalars([[float(rank)] for rank in range(64)], ["wait"])
    assert many == {"seqpar/wait/mean": 31.5, "seqpar/wait/max": 63.0}


def test_a_file_is_refused_as_a_folder(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(SeqParError, match="--seqpar-trace"):
        trace.install(str(file), lambda step: True)
