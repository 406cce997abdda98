# SPDX-License-Identifier: Apache-2.0
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megatron_seqpar.errors import SeqParError
from megatron_seqpar.quickstart import compare, runs
from megatron_seqpar.quickstart.machine import Machine
from megatron_seqpar.quickstart.plan import Run

CPU = Machine("cpu", "CPU", 1)

# Scripts that behave like a training run, without Megatron.
TRAINS = """
import json, sys
print("noise")
print("[seqpar] step 1/1, loss 2.5")
path = sys.argv[sys.argv.index("--seqpar-report") + 1]
open(path, "w").write(json.dumps({"steps": [1]}))
"""
FAILS = """
import sys
print("the reason")
sys.exit(3)
"""


def train(source: Path, folder: Path, show: Callable[[str], None]) -> dict[str, Any]:
    command = [sys.executable, "-u", str(source), "--seqpar-report", str(folder / runs.REPORT)]
    return runs.train("label", command, dict(os.environ), folder, "key", show)


def a_run(*arguments: str, ranks: int = 1) -> Run:
    return Run("name", "label", "attention", ranks, arguments)


def script(folder: Path, text: str) -> Path:
    path = folder / "script.py"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_run_shows_its_steps_and_is_reused(tmp_path: Path) -> None:
    lines: list[str] = []
    source = script(tmp_path, TRAINS)
    folder = tmp_path / "run"
    report = train(source, folder, lines.append)
    assert report == {"steps": [1]}
    assert lines == ["step 1/1, loss 2.5"]
    assert "noise" in (folder / "log.txt").read_text(encoding="utf-8")
    assert runs.finished(folder, "key") == report
    assert runs.finished(folder, "other key") is None


def test_a_failed_run_says_why_and_is_not_reused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(script(tmp_path, TRAINS), folder, lambda line: None)
    with pytest.raises(SeqParError, match=r"(?s)label failed with status 3.*the reason"):
        train(script(tmp_path, FAILS), folder, lambda line: None)
    assert runs.finished(folder, "key") is None


def test_an_error_that_all_ranks_share_is_said_once() -> None:
    tail = ["noise", "[rank 1/2] error: too long", "[rank 0/2] error: too long", "all stopped"]
    assert runs.reason(tail) == "too long"
    assert runs.reason(["one", "two"]) == "one\ntwo"


def test_an_interrupt_ends_the_ranks(tmp_path: Path) -> None:
    waits = f"""
import os, time
open({str(tmp_path / "pid")!r}, "w").write(str(os.getpid()))
print("[seqpar] waiting", flush=True)
time.sleep(600)
"""

    def interrupt(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(script(tmp_path, waits), tmp_path / "run", interrupt)
    pid = int((tmp_path / "pid").read_text(encoding="utf-8"))
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_the_command_goes_through_the_launcher() -> None:
    command = runs.launch_command(a_run("--x", ranks=2), CPU, Path("s.py"), Path("r.json"))
    assert command[1:] == [
        *("-m", "megatron_seqpar", "run", "--nproc", "2", "--device", "cpu", "s.py", "--x"),
        *("--seqpar-report", "r.json"),
    ]


def test_the_key_covers_what_decides_the_result(tmp_path: Path) -> None:
    source = script(tmp_path, TRAINS)

    def key(run: Run, machine: Machine = CPU, data: str = "d") -> str:
        return runs.run_key(run, machine, [source], data)

    first = key(a_run("--x"))
    assert first == key(a_run("--x"))
    others = {
        key(a_run("--y")),
        key(a_run("--x", ranks=2)),
        key(a_run("--x"), Machine("cuda", "GPU", 1)),
        key(a_run("--x"), data="e"),
    }
    script(tmp_path, FAILS)
    others.add(key(a_run("--x")))
    assert len(others | {first}) == 6


def report(losses: list[float]) -> dict[str, Any]:
    return {
        "steps": [{"iteration": i, "loss": loss} for i, loss in enumerate(losses, start=1)],
        "summary": {
            "tokens_per_second": 1234.5,
            "peak_memory_bytes": 3 * 2**20,
            "bytes_sent_per_rank_and_step": 2**19,
        },
        "ranks": [
            {"memory": "resident", "peak_memory_bytes": 3 * 2**20, "start_memory_bytes": 2**20}
        ],
        "device": {"kind": "cpu", "threads": 1},
        "model": {"layers": 1, "hidden": 2, "sequence_length": 4, "dtype": "float32"},
    }


@pytest.fixture
def results() -> list[compare.Result]:
    return [
        compare.Result(Run("sp2", "SP=2", "ours", 2, ()), report([2.0, 1.01])),
        compare.Result(Run("sp1", "SP=1", "stock", 1, ()), report([2.0, 1.0])),
    ]


def text(table: Any) -> str:
    console = Console(width=160, record=True, file=open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    console.print(table)
    return console.export_text()


def test_tables(results: list[compare.Result]) -> None:
    costs = text(compare.cost_table(results))
    assert "reference" in costs
    assert "1.0e-02" in costs
    assert "1,234" in costs
    assert "1 thread(s) a rank" in costs
    losses = text(compare.loss_table(results))
    assert "1.010000" in losses
    assert "0.0e+00" in losses


def test_tables_without_a_reference(results: list[compare.Result]) -> None:
    assert "reference" not in text(compare.cost_table(results[:1]))


def test_picture(results: list[compare.Result], tmp_path: Path) -> None:
    compare.plot(results, tmp_path / "new" / "losses.png")
    assert (tmp_path / "new" / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "new").iterdir())) == 1


def test_reports_are_plain_json(results: list[compare.Result]) -> None:
    assert json.loads(json.dumps(results[0].report)) == results[0].report
