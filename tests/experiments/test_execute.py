# SPDX-License-Identifier: Apache-2.0
"""Running jobs: what each ending is called, and that nothing outlives it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_seqpar.experiments.execute import execute
from megatron_seqpar.experiments.numbers import largest_difference, numbers
from tests.experiments.scripts import REPORT, job


def run(folder: Path, program: str, **changes):
    lines: list[str] = []
    outcome = execute(job(folder, program, **changes), folder / "run", lines.append)
    return outcome, lines


def test_a_run_that_trains(tmp_path):
    outcome, lines = run(tmp_path, REPORT)
    assert (outcome.status, outcome.reason, outcome.steps_seen) == ("ok", "", 1)
    assert lines == ["step 1/3, loss 3.0"]
    assert (tmp_path / "run" / "log.txt").read_text().startswith("[seqpar] step 1/3")
    found = numbers(outcome.report)
    assert found["step_time_s"] == 1.5, "the first step is not timed"
    assert found["step_time_spread"] == pytest.approx(1 / 1.5)
    assert found["tokens_per_s"] == pytest.approx(100 / 1.5)
    assert found["memory_since_start_bytes"] == 200
    assert found["bytes_sent_per_step"] == 300, "of the rank that sends most"
    assert found["bytes_by_kind"] == {"send": 200, "all_reduce": 100}
    assert found["losses"] == [3.0, 2.0, 1.5]
    assert found["plugin"] == {"seqpar_schedule": "auto"}


@pytest.mark.parametrize(
    ("program", "status", "says"),
    [
        ("raise SystemExit('megatron-seqpar: error: --x 3: no')", "error", "--x 3: no"),
        ("raise RuntimeError('CUDA out of memory. Tried')", "oom", "CUDA out of memory"),
        ("raise MemoryError", "oom", "MemoryError"),
        ("x = bytearray(4 << 30)", "oom", "MemoryError"),
        ("print('done')", "error", "without a report"),
        ("import time; time.sleep(60)", "error", "timeout: took longer than 1.5 s"),
    ],
)
def test_endings(tmp_path, program, status, says):
    seconds = 1.5 if "sleep" in program else 60.0
    outcome, _ = run(tmp_path, program, seconds=seconds, limit_bytes=1 << 30)
    assert outcome.status == status
    assert says in outcome.reason
    assert outcome.report == {}
    if status == "oom":
        assert "\n" not in outcome.reason, "the line that says so, without its traceback"


def test_an_error_of_all_ranks_is_said_once(tmp_path):
    lines = "".join(f"print('[rank {rank}/2] error: --tp 3: no')\n" for rank in range(2))
    outcome, _ = run(tmp_path, lines + "raise SystemExit(2)")
    assert outcome.reason == "--tp 3: no"


def test_a_stale_report_is_not_taken_for_a_new_one(tmp_path):
    run(tmp_path, REPORT)
    outcome, _ = run(tmp_path, "print('nothing')")
    assert outcome.status == "error"


def test_a_killed_command_takes_its_run_along(tmp_path):
    """SIGKILL gives it no chance to: the system ends what it started."""
    program = (
        "import os, pathlib, sys, time\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\n"
        "time.sleep(300)\n"
    )
    job(tmp_path, program)
    code = (
        "import pathlib, sys\n"
        f"sys.path.insert(0, {str(Path(__file__).resolve().parents[2])!r})\n"
        "from tests.experiments.scripts import Script\n"
        "from megatron_seqpar.experiments.execute import execute\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "task = Script('x', 1, (), folder / 'program.py', 'cpu')\n"
        "execute(task, folder / 'run', print)\n"
    )
    command = subprocess.Popen([sys.executable, "-c", code])
    try:
        written = tmp_path / "pid"
        pid = int(_eventually(lambda: written.read_text() if written.exists() else ""))
        command.send_signal(signal.SIGKILL)
        command.wait()
        _eventually(lambda: "gone" if not _runs(pid) else "")
    finally:
        command.kill()


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def _eventually(ask: Callable[[], str]) -> str:
    """What `ask` says once it says something; the test's own time limit is the only one."""
    while not (said := ask()):
        time.sleep(0.02)
    return said


def test_interrupting_ends_the_run(tmp_path):
    program = "import os, time\nprint('[seqpar] ' + str(os.getpid()), flush=True)\ntime.sleep(300)"
    pids = []

    def interrupt(line: str) -> None:
        pids.append(int(line))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(job(tmp_path, program), tmp_path / "run", interrupt)
    assert not _runs(pids[0])
    with pytest.raises(ProcessLookupError):
        os.killpg(pids[0], 0)


def test_loss_differences():
    assert largest_difference([1.0, 2.2], [1.0, 2.0]) == pytest.approx(0.1)
    assert largest_difference([1.0, float("nan")], [1.0, 2.0]) == float("inf")
    assert largest_difference([1.0, None], [1.0, 2.0]) is None
    with pytest.raises(ValueError, match="1 steps against 2"):
        largest_difference([1.0], [1.0, 2.0])
