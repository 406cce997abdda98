# SPDX-License-Identifier: Apache-2.0
"""`megatron-seqpar schedule`: its tables, its JSON, its picture, its refusals."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from megatron_seqpar.attention import Full, build_schedule
from megatron_seqpar.attention.schedules.auto import milliseconds
from megatron_seqpar.cli import app
from megatron_seqpar.commands.schedule_report import TileNames, human_bytes
from megatron_seqpar.errors import SeqParError

ISSUE = ("--size", "8", "--seq-length", "65536", "--heads", "32", "--kv-heads", "8")


def invoke(*arguments: str) -> str:
    """Output of a run that must succeed."""
    result = CliRunner().invoke(app, ["schedule", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def as_json(*arguments: str) -> dict[str, Any]:
    return json.loads(invoke(*arguments, "--json"))


def test_prints_steps_totals_idle_fraction_and_proof() -> None:
    output = invoke(*ISSUE)
    assert "balanced, P = 8, causal mask, 65,536 tokens (8,192 a rank)" in output
    assert "idle fraction 0.000000" in output
    assert "verified, forward and backward: 40 tiles" in output
    assert output.count("1.0000") == 8  # each rank's share of the work
    for text in ("step 5", "7×0", "4a×0", "4b×0", "kv → 1", "out → 7", "q → 0", "peak received"):
        assert text in output, text


def test_ring_leaves_ranks_idle() -> None:
    assert "idle fraction 0.466" in invoke(*ISSUE, "--schedule", "ring")


def test_full_mask_and_backward_pass() -> None:
    output = invoke(*ISSUE, "--mask", "full", "--backward")
    assert "full mask" in output
    assert "dkv → " in output
    assert "backward: tiles are" in output


def test_many_ranks_print_totals_only() -> None:
    output = invoke("--size", "40", "--seq-length", "4000")
    assert "steps are printed for up to 16 ranks" in output
    assert "step 3" not in output


@pytest.mark.parametrize("mask", ["causal", "full"])
@pytest.mark.parametrize("name", ["balanced", "ring"])
def test_json_holds_what_the_schedule_says(name: str, mask: str) -> None:
    options = ("--size", "6", "--lengths", "7,9,8,8,5,8", "--heads", "6", "--kv-heads", "2")
    got = as_json(*options, "--head-dim", "16", "--schedule", name, "--mask", mask,
                  "--dtype", "float32")  # fmt: skip
    built = build_schedule(
        name, size=6, lengths=(7, 9, 8, 8, 5, 8), query_heads=6, kv_heads=2, head_dim=16,
        **({"mask": Full()} if mask == "full" else {}),
    )  # fmt: skip
    assert got["verified"] is True
    assert got["lengths"] == [7, 9, 8, 8, 5, 8]
    assert got["idle_fraction"] == built.idle_fraction
    for direction in ("forward", "backward"):
        pairs = 0
        for rank, entry in enumerate(got[direction]):
            sends = [t for step in entry["steps"] for t in step["sends"]]
            assert entry["bytes_sent"] == built.bytes_sent(rank, direction, "float32")
            assert entry["bytes_sent"] == sum(t["bytes"] for t in sends)
            assert entry["messages_sent"] == built.messages_sent(rank, direction)
            assert all(t["src"] == rank != t["dst"] for t in sends)
            pairs += sum(t["pairs"] for step in entry["steps"] for t in step["tiles"])
        assert pairs == (45 * 46 // 2 if mask == "causal" else 45 * 45)


def test_needs_no_torch() -> None:
    code = (
        "import sys; from megatron_seqpar.cli import app\n"
        "try: app(['schedule', '--size', '3', '--seq-length', '30'])\n"
        "except SystemExit as stop: assert not stop.code\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_plot(tmp_path: Path, suffix: str) -> None:
    picture = tmp_path / f"s{suffix}"
    assert f"drawn in {picture}" in invoke(*ISSUE, "--plot", str(picture)).replace("\n", "")
    data = picture.read_bytes()
    if suffix == ".png":
        assert data.startswith(b"\x89PNG")
        width, height = struct.unpack(">II", data[16:24])
        assert width > 1200
        assert height > 600
    else:
        text = data.decode()
        assert "<svg" in text


@pytest.mark.parametrize(
    "options",
    [
        ("--size", "1", "--seq-length", "5"),
        ("--size", "2", "--seq-length", "3", "--backward"),
        ("--size", "6", "--seq-length", "4096", "--schedule", "ring", "--backward"),
        ("--size", "21", "--seq-length", "40960"),
        ("--size", "5", "--lengths", "1,1,9,2,4", "--mask", "full"),
    ],
)
def test_plots_of_odd_sizes(tmp_path: Path, options: tuple[str, ...]) -> None:
    invoke(*options, "--plot", str(tmp_path / "s.svg"))
    assert (tmp_path / "s.svg").stat().st_size > 1000


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--size", "8"), "give exactly one of --seq-length and --lengths"),
        (("--size", "8", "--seq-length", "7"), "shorter than size=8"),
        (("--size", "0", "--seq-length", "7"), "needs at least one rank"),
        (("--size", "2", "--lengths", "7,x"), "--lengths 7,x: give whole numbers"),
        (("--size", "2", "--lengths", "7"), "lengths has 1 entries but size=2"),
        ((*ISSUE, "--schedule", "spiral"), "'spiral' is unknown; use one of auto, balanced, z"),
        ((*ISSUE, "--mask", "sliding"), "mask='sliding' is unknown; use one of causal, full"),
        ((*ISSUE, "--dtype", "int8"), "dtype=int8: use one of"),
        ((*ISSUE, "--token-layout", "striped"), "--token-layout striped: use contiguous or zigzag"),
        ((*ISSUE, "--node-size", "3"), "--node-size 3: does not divide --size"),
        ((*ISSUE, "--explain", "--objective", "luck"), "objective='luck': use one of time, bytes"),
        ((*ISSUE, "--cluster", "abacus"), "cluster abacus: unknown; use one of dgx-a100"),
        ((*ISSUE, "--kv-heads", "5"), "query_heads=32 is not a multiple of kv_heads=5"),
        (
            (*ISSUE, "--plot", "no/such/folder/s.png"),
            "--plot no/such/folder/s.png: there is no folder",
        ),
        ((*ISSUE, "--plot", "s.docx"), "--plot s.docx: the name must end in one of"),
    ],
)
def test_bad_input_is_one_clear_message(options: tuple[str, ...], says: str) -> None:
    result = CliRunner().invoke(app, ["schedule", *options])
    assert isinstance(result.exception, SeqParError)
    assert says in str(result.exception)


def test_names_of_tiles() -> None:
    built = build_schedule("balanced", size=2, seq_length=8)
    names = TileNames(built)
    assert names.any_cut
    found = {names(t) for steps in built.plan for step in steps for t in step.tiles}
    assert found == {"0×0", "1×1", "1a×0", "1b×0"}
    assert not TileNames(build_schedule("balanced", size=3, seq_length=9)).any_cut


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1536, "1.5 KiB"), (300 * 2**20, "300 MiB"), (2**40, "1024 GiB")],
)
def test_human_bytes(count: int, text: str) -> None:
    assert human_bytes(count) == text


def test_explain_prints_every_candidate_and_why() -> None:
    options = ["--size", "8", "--seq-length", "32768", "--heads", "33", "--schedule", "auto"]
    result = CliRunner().invoke(
        app, ["schedule", *options, "--explain", "--cluster", "dgx-a100-100g", "--node-size", "4"]
    )
    assert result.exit_code == 0, result.output
    for name in ("balanced", "zigzag", "ring", "ulysses", "solver", "allgather+zigzag"):
        assert name in result.output
    assert "on dgx-a100-100g, predicted" in result.output
    assert "auto (least time) takes" in result.output
    assert "not tried" not in result.output


@pytest.mark.parametrize(
    ("options", "lines"),
    [
        (
            ["--mask", "window:100"],
            [
                "left out: schedule 'balanced' does not serve mask 'window'; it serves causal and "
                "full: use solver or auto",
                "left out: schedule 'ulysses+zigzag' needs several nodes of several ranks",
            ],
        ),
        (
            ["--mask", "documents:" + ",".join(str(400 * n) for n in range(1, 11))],
            [
                "not tried, masks of more than 8 regions get what is quick to plan: balanced, "
                "zigzag, ring, ulysses, "
            ],
        ),
    ],
)
def test_explain_says_why_others_are_not_compared(options: list[str], lines: list[str]) -> None:
    command = ["schedule", "--size", "4", "--seq-length", "4000", "--schedule", "auto"]
    result = CliRunner().invoke(app, [*command, "--explain", *options])
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    for line in lines:
        assert line in said, result.output


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3.27e-4, "0.327 ms"), (0.0319, "31.9 ms"), (0.0999, "99.9 ms"), (1.0741, "1,074 ms")],
)
def test_milliseconds(seconds: float, text: str) -> None:
    assert milliseconds(seconds) == text


def test_explain_by_bytes_needs_no_cluster() -> None:
    result = CliRunner().invoke(
        app, ["schedule", *ISSUE, "--schedule", "auto", "--objective", "bytes", "--json"]
    )
    auto = json.loads(result.stdout)["auto"]
    assert auto["cluster"] is None
    sent = [c["bytes_total"] for c in auto["candidates"] if c["refusal"] is None]
    assert sent == sorted(sent)
    assert len(sent) >= 6
    assert any("needs several nodes" in (c["refusal"] or "") for c in auto["candidates"])


def test_a_replay_is_drawn_and_traced(tmp_path: Path) -> None:
    picture, trace = tmp_path / "t.png", tmp_path / "t.json"
    result = CliRunner().invoke(
        app, ["schedule", *ISSUE, "--timeline", str(picture), "--trace", str(trace)]
    )
    assert result.exit_code == 0, result.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert json.loads(trace.read_text())["traceEvents"]
