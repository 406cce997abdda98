# SPDX-License-Identifier: Apache-2.0
"""docs/simulate.md: its examples run, its tables are what the code gives, its pictures exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_seqpar.attention import build_schedule
from megatron_seqpar.attention.ir import Problem, Tile
from megatron_seqpar.attention.layouts import Span, TokenLayout
from megatron_seqpar.attention.masks import Full
from megatron_seqpar.cli import app
from megatron_seqpar.errors import ClusterError
from megatron_seqpar.simulate import (
    attention_flops,
    cluster_names,
    load_cluster,
    predict,
    tile_seconds,
)

DOCS = Path(__file__).resolve().parents[2] / "docs"
TEXT = (DOCS / "simulate.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"\(`megatron-seqpar (schedule [^`]*)`\)", TEXT)
PREDICTED = re.findall(r"^\| `([\w+]+)` \| (.*) \|$", TEXT, re.MULTILINE)
KERNELS = re.findall(
    r"^\| (dgx-\w+) \| (\d+) x (\d+) x (\d+) \| (\d+) \| (\w+) \| (\w+) \| (\d+) \| (\d+) \|$",
    TEXT,
    re.MULTILINE,
)


def example(name: str, folder: Path) -> Path:
    (code,) = re.findall(rf"```python\n(# {name}\.py\n.*?)```", TEXT, re.DOTALL)
    path = folder / f"{name}.py"
    path.write_text(code, encoding="utf-8")
    return path


def test_the_tables_are_there() -> None:
    assert (len(COMMANDS), len(PREDICTED), len(KERNELS)) == (3, 4, 10)
    listed = re.search(r"\]\(\.\./configs/clusters\) has (.*?)\. A wheel", TEXT)
    assert listed is not None
    assert sorted(re.findall(r"`([\w-]+)`", listed.group(1))) == sorted(cluster_names())


@pytest.mark.parametrize(("name", "cells"), PREDICTED)
def test_table_of_predictions(name: str, cells: str) -> None:
    plan = build_schedule(
        name, size=16, seq_length=131072, query_heads=32, kv_heads=8, head_dim=128, node_size=8
    )
    found = []
    for where in ("dgx-a100", "dgx-a100-100g", "dgx-h100", "dgx-b200"):
        both = predict(plan, load_cluster(where), "bfloat16")
        found.append(f"{both.forward_s * 1e3:.0f} + {both.backward_s * 1e3:.0f}")
    assert cells.split(" | ") == found


@pytest.mark.parametrize("row", KERNELS, ids="-".join)
def test_table_of_kernels(row: tuple[str, ...]) -> None:
    where, *sizes, kind, direction, published, here = row
    assert direction in ("forward", "backward")
    batch, heads, tokens, dim = map(int, sizes)
    pairs = tokens * tokens if kind == "full" else tokens * (tokens + 1) // 2
    whole = Span(0, tokens)
    tile = Tile(whole, whole, Span(0, heads), None, None, pairs)
    problem = Problem(TokenLayout.contiguous(1, seq_length=tokens), Full(), heads, heads, dim, dim)
    pass_ = "forward" if direction == "forward" else "backward"
    seconds = tile_seconds(tile, problem, "bfloat16", pass_, load_cluster(where), batch)
    speed = batch * attention_flops(pairs, heads, dim, dim, pass_) / seconds / 1e12
    assert f"{speed:.0f}" == here
    assert speed == pytest.approx(float(published), rel=0.015)


@pytest.mark.parametrize("command", COMMANDS)
def test_pictures_are_drawn_by_the_commands_beside_them(command: str, tmp_path: Path) -> None:
    words = shlex.split(command)
    at = words.index("--timeline") + 1
    picture = Path(words[at])
    assert (DOCS.parent / picture).is_file()
    assert f"]({picture.relative_to('docs')})" in TEXT
    words[at] = str(tmp_path / "picture.png")
    assert CliRunner().invoke(app, words).exit_code == 0
    assert (tmp_path / "picture.png").is_file()


def test_the_example_of_simulating(tmp_path: Path) -> None:
    path = example("simulate_example", tmp_path)
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, check=True)
    first, second, *events = done.stdout.splitlines()
    assert re.fullmatch(r"forward \d+\.\d ms, backward \d+\.\d ms", first)
    assert re.fullmatch(r"rank 7 waits \d+ us, \d+\.\d% of all time is waiting", second)
    assert len(events) == 3
    assert "tile q[57344,65536) kv[57344,65536)" in done.stdout


def test_the_example_of_calibrating(tmp_path: Path) -> None:
    example("calibrate_example", tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "calibrate_example.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    for curve in ("forward_full", "forward_band", "backward_full", "backward_band"):
        assert re.search(rf"^{curve}: \d+\.\d% in the median, ", done.stdout, re.MULTILINE)
    mine = load_cluster(tmp_path / "mine.yaml")
    assert mine.kernel.forward_full.share[64].source == "measured today"


def test_a_mistake_is_refused_as_said() -> None:
    with pytest.raises(ClusterError, match="cluster nowhere: unknown; use one of"):
        load_cluster("nowhere")
