# SPDX-License-Identifier: Apache-2.0
"""`bench collectives` under torchrun, which starts the ranks as on several nodes; and its fits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_seqpar.bench import collectives
from megatron_seqpar.bench.collectives import OPERATIONS, pairs_of, sent, whole_elements
from megatron_seqpar.bench.place import Place
from megatron_seqpar.errors import ClusterError
from megatron_seqpar.simulate import load_cluster
from tests.bench.command import refused

SIZES = (3072, 98304)
GLOO = Place("cpu", 3, 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("collectives")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "3", "-m", "megatron_seqpar", "bench", "collectives"]
    command += ["--device", "cpu", "--sizes", ",".join(map(str, SIZES)), "--rounds", "2"]
    command += ["--json", "r.json", "--plot", "r.png"]
    done = subprocess.run(
        command, cwd=made, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("ring shift") >= 2  # both tables, once: rank 0 alone speaks
    assert done.stdout.count("beside cluster laptop") == 1
    return made


@pytest.fixture(scope="module")
def result(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "r.json").read_text())
    return found


def test_every_operation_size_and_pair_has_a_row(result: dict[str, Any]) -> None:
    found = [(r["operation"], tuple(r.get("pair", ())), r["bytes"]) for r in result["rows"]]
    expected = [("message", pair, size) for size in SIZES for pair in pairs_of(3)]
    expected += [(name, (), size) for size in SIZES for name in OPERATIONS if name != "message"]
    assert sorted(found) == sorted(expected)
    assert (result["ranks"], result["backend"], result["node_size"]) == (3, "gloo", 3)


def test_bandwidth_is_of_what_must_be_sent(result: dict[str, Any]) -> None:
    shares = {
        "all-gather": 2 / 3,
        "reduce-scatter": 2 / 3,
        "all-to-all": 2 / 3,
        "all-reduce": 4 / 3,
    }
    for row in result["rows"]:
        moved = row["bytes"] * shares.get(row["operation"], 1.0)
        assert row["bytes_sent_per_rank"] == pytest.approx(moved)
        assert row["bandwidth"] == pytest.approx(moved / row["seconds"])
        assert row["seconds_least"] <= row["seconds"] <= row["seconds_most"]
        assert len(row["seconds_by_round"]) == 2
        assert row["within_node"]


def test_fits_stand_beside_the_clusters_numbers(result: dict[str, Any], folder: Path) -> None:
    link = load_cluster("laptop").intra
    steps = {"all-reduce": 4, "all-gather": 2, "reduce-scatter": 2, "all-to-all": 2}
    assert [fit["operation"] for fit in result["fits"]] == list(OPERATIONS)
    for fit in result["fits"]:
        assert fit["assumed_bandwidth"] == link.bandwidth
        assumed = steps.get(fit["operation"], 1) * link.latency.value
        assert fit["assumed_latency"] == pytest.approx(assumed)
    assert (folder / "r.png").stat().st_size > 10_000


def _row(operation: str, size: int, seconds: float, within: bool = True) -> dict[str, Any]:
    return {
        "operation": operation,
        "within_node": within,
        "bytes": size,
        "status": "ok",
        "bytes_sent_per_rank": sent(operation, size, 3),
        "seconds": seconds,
    }


def test_a_link_that_is_as_the_fit_says_is_found_again() -> None:
    latency, bandwidth = 2e-4, 1.5e9
    rows = [
        _row(name, size, latency + sent(name, size, 3) / bandwidth)
        for name in OPERATIONS
        for size in (1024, 2**16, 2**22)
    ]
    for fit in collectives.fits(rows, GLOO, load_cluster("laptop")):
        assert fit["latency"] == pytest.approx(latency, rel=1e-4)  # bytes are whole
        assert fit["bandwidth"] == pytest.approx(bandwidth, rel=1e-4)
        assert fit["worst_error"] < 1e-4


def test_messages_between_nodes_have_a_fit_of_their_own() -> None:
    rows = [_row("message", size, 1e-4 + size / 3e9) for size in (1024, 2**22)]
    rows += [_row("message", size, 3e-4 + size / 1e8, within=False) for size in (1024, 2**22)]
    near, far = collectives.fits(rows, Place("cpu", 4, 2), load_cluster("laptop"))
    assert near["bandwidth"] == pytest.approx(3e9)
    assert far["bandwidth"] == pytest.approx(1e8)
    assert far["assumed_bandwidth"] == load_cluster("laptop").inter.bandwidth


def test_measured_links_are_saved_with_the_cluster(tmp_path: Path) -> None:
    rows = [_row("message", size, 1e-4 + size / 3e9) for size in (1024, 2**22)]
    rows += [_row("all-reduce", size, 1.0) for size in (1024, 2**22)]
    known = load_cluster("laptop")
    collectives.save_measured(known, rows, "a command", tmp_path / "here.yaml")
    saved = load_cluster(tmp_path / "here.yaml")
    assert saved.intra.latency.value == pytest.approx(1e-4)
    assert saved.intra.bandwidth == pytest.approx(3e9)
    assert str(saved.intra.latency.basis) == "measured"
    assert saved.inter == known.inter


def test_seconds_that_do_not_grow_have_no_fit(tmp_path: Path) -> None:
    (fit,) = collectives.fits([_row("message", 1024, 1e-4)], GLOO, load_cluster("laptop"))
    assert "two sizes" in fit["why_no_fit"]
    with pytest.raises(ClusterError, match="no messages"):
        collectives.save_measured(load_cluster("laptop"), [], "", tmp_path / "c.yaml")


def test_buffers_have_a_share_for_every_rank() -> None:
    assert whole_elements(1024, 3) * 4 == 1020
    assert whole_elements(4, 8) == 8
    assert pairs_of(3) == [(0, 1), (0, 2), (1, 2)]
    assert pairs_of(16) == [(0, other) for other in range(1, 16)]


def test_refusals() -> None:
    cpu = ("collectives", "--device", "cpu")
    assert "one rank sends nothing" in refused(*cpu, "--ranks", "1")
    assert "--operations broadcast" in refused(*cpu, "--operations", "broadcast")
    assert "at least 4" in refused(*cpu, "--sizes", "2")
    assert "cluster nowhere: unknown" in refused(*cpu, "--cluster", "nowhere")
    torchrun = {"RANK": "0", "WORLD_SIZE": "2"}
    assert "torchrun started 2 ranks" in refused(*cpu, "--ranks", "4", **torchrun)
