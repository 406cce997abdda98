# SPDX-License-Identifier: Apache-2.0
"""`bench attention` on two real ranks: every row is there, and says the same as its rounds."""

from __future__ import annotations

import json
import statistics
from typing import Any

import pytest

from megatron_seqpar.attention import build_schedule
from tests.bench.command import bench, refused

WAYS = ["one rank", "one rank, all busy", "balanced", "balanced, no overlap", "ring"]
WAYS += ["ring, no overlap"]
TOKENS = (192, 2**43, 2**44)  # the last two fit no machine


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("attention")
    output = bench(
        *("attention", "--device", "cpu", "--ranks", "2", "--tokens", "192,8192G,16384G"),
        *("--schedules", "balanced,ring,ulysses+balanced", "--without-overlap", "--rounds", "2"),
        *("--heads", "4", "--head-dim", "16", "--batch", "2"),
        *("--json", folder / "r.json", "--plot", folder / "r.png"),
    )
    assert "efficiency" in output
    assert (folder / "r.png").stat().st_size > 10_000
    found: dict[str, Any] = json.loads((folder / "r.json").read_text())
    return found


def rows(result: dict[str, Any], status: str) -> list[dict[str, Any]]:
    return [row for row in result["rows"] if row["status"] == status]


def test_every_way_and_length_has_a_row(result: dict[str, Any]) -> None:
    measured = rows(result, "ok")
    assert [row["way"] for row in measured] == WAYS
    assert {(row["tokens"], row["ranks"]) for row in measured} == {(192, 2)}
    assert {row["kernel"] for row in result["rows"]} == {"cpu"}  # what auto took
    assert all(len(row["seconds_by_round"]) == 2 and row["calls"] >= 1 for row in measured)
    assert result["settings"]["kv_heads"] == 1
    assert result["settings"]["dtype"] == "float32"


def test_ratios_are_those_of_the_rounds(result: dict[str, Any]) -> None:
    by_way = {row["way"]: row for row in rows(result, "ok")}

    def ratio(above: str, below: str) -> float:
        pairs = (by_way[way]["seconds_by_round"] for way in (above, below))
        return statistics.median(a / b for a, b in zip(*pairs, strict=True))

    for way in WAYS[2:]:
        row = by_way[way]
        assert row["efficiency"] == pytest.approx(ratio("one rank", way) / 2)
        assert row["efficiency_busy"] == pytest.approx(ratio("one rank, all busy", way) / 2)
        assert row["over_first"] == pytest.approx(ratio(way, "balanced"))
        assert row["seconds"] == statistics.median(row["seconds_by_round"])
    pairs = 192 * 193 / 2
    flops = (
        2 * 4 * pairs * (2 * 32 + 2 * 80)
    )  # samples, heads; forward dk + dv, backward 3 dk + 2 dv
    for way, row in by_way.items():
        ranks = 1 if way.startswith("one rank") else 2
        rate = row["tflops_per_rank"] * 1e12
        assert rate == pytest.approx(flops / row["seconds"] / ranks)


def test_what_is_timed_computes_attention(result: dict[str, Any]) -> None:
    for row in rows(result, "ok")[2:]:
        assert 0 <= row["largest_difference_from_one_rank"] < 1e-5


def test_the_schedules_own_numbers(result: dict[str, Any]) -> None:
    plan = build_schedule("ring", size=2, seq_length=192, query_heads=4, kv_heads=1, head_dim=16)
    sent = sum(
        plan.bytes_sent(rank, direction, "float32", batch=2)
        for rank in range(2)
        for direction in ("forward", "backward")
    )
    (row,) = (row for row in result["rows"] if row["way"] == "ring" and row["tokens"] == 192)
    assert row["bytes_sent_per_rank"] == sent / 2
    assert row["idle_fraction"] == plan.idle_fraction
    assert row["schedule"] == "ring"


def test_what_cannot_be_measured_is_a_row(result: dict[str, Any]) -> None:
    refusals = rows(result, "refused")
    assert {row["way"] for row in refusals} == {
        "ulysses+balanced",
        "ulysses+balanced, no overlap",
    }
    assert [row["tokens"] for row in refusals] == sorted(TOKENS * 2)
    assert all("node" in row["why"] for row in refusals)
    too_long = rows(result, "oom")
    assert [row["way"] for row in too_long] == WAYS * 2
    assert {row["why"] for row in too_long if row["tokens"] == TOKENS[2]} == {
        f"{TOKENS[1]:,} tokens did not fit"
    }


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--schedules", "spiral"), "--schedules spiral"),
        (("--dtype", "int8"), "--dtype int8"),
        (("--heads", "4", "--kv-heads", "3"), "KV heads must divide"),
        (("--mask", "holes"), "mask='holes'"),
        (("--ranks", "0"), "--ranks 0"),
        (("--ranks", "2", "--node-size", "4"), "--node-size 4"),
        (("--token-layouts", "spiral"), "--token-layouts spiral"),
    ],
)
def test_refusals(arguments: tuple[str, ...], why: str) -> None:
    assert why in refused("attention", "--device", "cpu", *arguments)


@pytest.mark.slow
def test_a_kernel_that_does_not_serve_is_refused_by_the_ranks() -> None:
    asked = ("attention", "--device", "cpu", "--ranks", "1", "--tokens", "16")
    assert "kernel='flash2'" in refused(*asked, "--kernels", "flash2")
    output = bench(*asked, "--kernels", "flash2,reference", "--rounds", "1")
    assert "1 rank, flash2, one rank: refused: kernel='flash2'" in output
