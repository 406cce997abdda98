# SPDX-License-Identifier: Apache-2.0
"""What docs/ says is what the code does: its example runs, its numbers are the schedule's."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_seqpar.attention import build_schedule
from megatron_seqpar.attention.kernels import KERNELS
from megatron_seqpar.cli import app

DOCS = Path(__file__).resolve().parents[2] / "docs"
SCHEDULE = (DOCS / "schedule.md").read_text(encoding="utf-8")
ATTENTION = (DOCS / "attention.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (\d+):(\d+) \| (\d+) \| (.*) \|$", SCHEDULE, re.MULTILINE)
COMMANDS = re.findall(r"\(`megatron-seqpar (schedule [^`]*)`\)", SCHEDULE)


def test_example_of_attention_runs(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(# attention_example\.py\n.*?)```", ATTENTION, re.DOTALL)
    (tmp_path / "attention_example.py").write_text(code, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "attention_example.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(f"rank {rank}: tokens" in done.stdout for rank in range(2))
    assert done.stdout.count("agree") == 2


@pytest.mark.parametrize(("heads", "kv_heads", "size", "cells"), ROWS)
def test_table_of_bytes(heads: str, kv_heads: str, size: str, cells: str) -> None:
    expected = []
    for name in ("balanced", "ring"):
        plan = build_schedule(
            name, size=int(size), seq_length=65536, query_heads=int(heads),
            kv_heads=int(kv_heads), head_dim=128,
        )  # fmt: skip
        for direction in ("forward", "backward"):
            sent = [plan.bytes_sent(r, direction, "bfloat16") / 2**20 for r in range(plan.size)]
            expected.append(f"{sum(sent) / plan.size:.0f} / {max(sent):.0f}")
    assert cells.split(" | ") == expected


@pytest.mark.parametrize(("size", "heads", "kv_heads"), [(8, 6, 2), (9, 4, 4), (64, 32, 8)])
def test_formulas_of_bytes(size: int, heads: int, kv_heads: int) -> None:
    tokens, dim, item = 16, 32, 2
    plan = build_schedule("balanced", size=size, seq_length=size * tokens, query_heads=heads,
                          kv_heads=kv_heads, head_dim=dim)  # fmt: skip
    even = size % 2 == 0
    m = (size - 1) // 2
    kv_routes = size * m - m * (m + 1) / 2 + (size / 2 if even else 0)
    q_routes = m * (m + 1) / 2 + (size / 4 if even else 0)
    kv, q = kv_heads * dim * item * tokens, heads * dim * item * tokens
    forward = kv_routes * 2 * kv + q_routes * (2 * q + 4 * heads * tokens)
    backward = kv_routes * 4 * kv + q_routes * (3 * q + 8 * heads * tokens)
    for direction, total in (("forward", forward), ("backward", backward)):
        assert sum(plan.bytes_sent(r, direction, item) for r in range(size)) == total


def test_odd_chunks_idle_as_little_as_said() -> None:
    def idle(length: int) -> float:
        return build_schedule("balanced", size=8, lengths=[length] * 8).idle_fraction

    assert idle(100) == 0
    assert f"{idle(101):.4f}" == "0.0012"
    assert "0.0012 at P = 8 and L = 101" in SCHEDULE


def test_tables_are_there() -> None:
    assert len(ROWS) == 8
    assert len(COMMANDS) == 7
    listed = re.findall(r"^\| `([a-z0-9]+)` \| ", ATTENTION, re.MULTILINE)
    assert listed == [record.name for record in KERNELS]


@pytest.mark.parametrize("command", COMMANDS)
def test_pictures_are_drawn_by_the_commands_beside_them(command: str, tmp_path: Path) -> None:
    words = shlex.split(command)
    picture = words[words.index("--plot") + 1]
    assert (DOCS.parent / picture).is_file()
    assert f"]({Path(picture).relative_to('docs')})" in SCHEDULE
    words[words.index("--plot") + 1] = str(tmp_path / "picture.png")
    assert CliRunner().invoke(app, words).exit_code == 0
    assert (tmp_path / "picture.png").is_file()
