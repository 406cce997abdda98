# SPDX-License-Identifier: Apache-2.0
"""Traces and pictures of timelines."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_seqpar.attention import build_schedule
from megatron_seqpar.errors import SeqParError
from megatron_seqpar.simulate import Timeline, load_cluster, simulate
from megatron_seqpar.simulate.perfetto import trace_of
from megatron_seqpar.simulate.plot import save_plot, title

from .plans import Move, Work, cluster, schedule


def two_ranks(**options: bool) -> Timeline:
    plan = schedule(2, [Work(0, 0, 2), Work(0, 1, 5), Work(1, 1, 4)], [Move(0, 0, 1, 3)])
    return simulate(plan, cluster(latency=0.5), **options)


# ---- traces ---------------------------------------------------------------------------------


def test_a_trace_by_hand(tmp_path: Path) -> None:
    trace_of(two_ranks()).write(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    threads = {
        (e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"
    }
    bars = {
        (e["pid"], threads[e["pid"], e["tid"]], e["name"], e["ts"], e["dur"])
        for e in events
        if e["ph"] == "X"
    }
    second = 1e6  # microseconds
    assert bars == {
        (0, "compute", "tile q[0,1) kv[0,2)", 0, 2 * second),
        (0, "send", "kv [0,3) to 1", 0, 3 * second),
        (0, "wait", "wait 0", 2 * second, 1.5 * second),
        (1, "compute", "tile q[0,1) kv[0,5)", 0, 5 * second),
        (1, "receive", "kv [0,3) from 0", 0, 3 * second),
        (1, "compute", "tile q[0,1) kv[0,4)", 5 * second, 4 * second),
    }
    (send,) = (e for e in events if e["name"] == "kv [0,3) to 1")
    assert send["args"] == {
        "direction": "forward", "step": 0, "payload": "kv", "tokens": [0, 3], "heads": [0, 1],
        "src": 0, "dst": 1, "bytes": 12, "latency_us": 0.5 * second,
    }  # fmt: skip
    (tile,) = (e for e in events if e["name"] == "tile q[0,1) kv[0,4)")
    assert tile["args"] == {
        "direction": "forward", "step": 1, "q": [0, 1], "kv": [0, 4], "heads": [0, 1], "pairs": 4,
    }  # fmt: skip
    assert [(e["ph"], e["pid"]) for e in events if e["ph"] in "sf"] == [("s", 0), ("f", 1)]


def test_a_trace_of_both_passes(tmp_path: Path) -> None:
    plan = build_schedule("balanced", size=4, seq_length=4096, query_heads=4, node_size=2)
    on = load_cluster("dgx-a100-100g").with_ranks_per_node(2)
    passes = [simulate(each, on) for each in (plan, plan.backward())]
    writer = trace_of(*passes)
    bars = [e for e in writer.events if e["ph"] == "X"]
    assert len(bars) == sum(len(events) for timeline in passes for events in timeline.events)
    assert max(e["ts"] + e["dur"] for e in bars) == pytest.approx(
        1e6 * sum(timeline.makespan for timeline in passes)
    )
    backward = [e for e in bars if e["args"]["direction"] == "backward"]
    assert min(e["ts"] for e in backward) == pytest.approx(1e6 * passes[0].makespan)
    transfers = sum(len(s.sends) for p in (plan, plan.backward()) for r in p.plan for s in r)
    assert sum(e["ph"] == "s" for e in writer.events) == transfers
    tracks = {e["args"]["name"] for e in writer.events if e["name"] == "thread_name"}
    assert tracks == {
        "compute", "wait", "send", "receive", "send to other nodes", "receive from other nodes",
    }  # fmt: skip
    writer.write(tmp_path / "both.json.gz")


# ---- pictures -------------------------------------------------------------------------------


def test_a_title_says_what_and_how_long() -> None:
    assert title(two_ranks()) == (
        "by hand, forward on round, P = 2, bfloat16: 9 s, 8.3% waiting, 38.9% outside tiles"
    )
    assert "bfloat16, no overlap: 12.5 s, 28.0% waiting" in title(two_ranks(overlap=False))


def test_a_picture_of_both_passes(tmp_path: Path) -> None:
    plan = build_schedule("balanced", size=4, seq_length=4096, query_heads=4)
    on = load_cluster("dgx-h100")
    path = tmp_path / "timeline.png"
    save_plot((simulate(plan, on), simulate(plan.backward(), on)), path)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", data[16:24])
    assert width > 1000
    assert height > 500


def test_pictures_that_cannot_be_drawn(tmp_path: Path) -> None:
    with pytest.raises(SeqParError, match="simulate with events=True"):
        save_plot(two_ranks(events=False), tmp_path / "a.png")
    with pytest.raises(SeqParError, match=r"drawing .*a\.nothing"):
        save_plot(two_ranks(), tmp_path / "a.nothing")
    with pytest.raises(SeqParError, match=r"drawing .*missing"):
        save_plot(two_ranks(), tmp_path / "missing" / "a.png")


def test_without_matplotlib(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['matplotlib.figure'] = None\n"
        "from megatron_seqpar.simulate.plot import save_plot\n"
        "from megatron_seqpar.errors import SeqParError\n"
        "try:\n    save_plot((), 'x.png')\n"
        "except SeqParError as failure:\n    print(failure)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "needs matplotlib: pip install matplotlib" in done.stdout
