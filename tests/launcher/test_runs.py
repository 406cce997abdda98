# SPDX-License-Identifier: Apache-2.0
"""Runs of scripts through the launcher: what they are given, and what failures look like."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tests.cpu_runtime.training import SCRIPT, TINY, run_launcher

SHOW = """
    import os, sys, torch
    import beside
    print("ARGV", sys.argv[1:])
    print("NAME", __name__, os.path.basename(__file__), sys.path[0] == os.path.dirname(__file__))
    print("WORLD", os.environ["RANK"], os.environ["WORLD_SIZE"], torch.cuda.is_available())
"""
COLLECTIVES = """
    import os, signal, sys, time
    import torch
    import torch.distributed as dist
    from megatron_seqpar.errors import SeqParError

    dist.init_process_group("nccl")
    rank, number = dist.get_rank(), torch.ones(1, device="cuda")
    for step in range(1000):
        dist.all_reduce(number)
        number.fill_(1)
        if rank == 1 and step == 3:
            {failure}
    raise SystemExit("the run should not get here")
"""


def write(folder: Path, name: str, text: str) -> str:
    file = folder / name
    file.write_text(textwrap.dedent(text))
    return str(file)


def test_the_script_runs_as_python_would_run_it(tmp_path: Path) -> None:
    write(tmp_path, "beside.py", "")
    script = write(tmp_path, "show.py", SHOW)
    run = run_launcher("--device", "cpu", script, "--nproc", "9", "--device=x", "--lr", "1", "--")
    assert run.status == 0, run.stderr
    assert run.stdout.splitlines() == [
        "ARGV ['--nproc', '9', '--device=x', '--lr', '1', '--']",
        "NAME __main__ show.py True",
        "WORLD 0 1 True",
    ]


def test_help_after_the_script_is_the_scripts_in_one_process() -> None:
    run = run_launcher("--nproc", "2", str(SCRIPT), "--help")
    assert run.status == 0, run.stderr
    assert run.stdout.count("usage: pretrain_gpt.py") == 1
    assert "--tensor-model-parallel-size" in run.stdout


@pytest.mark.parametrize(
    ("failure", "status", "block", "summary"),
    [
        (
            "os.kill(os.getpid(), signal.SIGKILL)",
            137,
            # rank 0 finds the connection closed, or is stopped before it does
            r"\[rank 0/2\] (error: lost the connection to|stopped:) another rank",
            "megatron-seqpar: rank 1 was killed by SIGKILL",
        ),
        (
            "raise SeqParError('--size 3 does not divide 8')",
            1,
            r"\[rank 1/2\] error: --size 3 does not divide 8",
            "megatron-seqpar: rank 1 failed with exit code 1; all ranks stopped",
        ),
    ],
    ids=["killed", "seqpar-error"],
)
def test_a_rank_that_fails_stops_the_run_with_a_few_lines(
    failure: str, status: int, block: str, summary: str, tmp_path: Path
) -> None:
    script = write(tmp_path, "fails.py", COLLECTIVES.format(failure=failure))
    start = time.monotonic()
    run = run_launcher("--nproc=2", "--device=cpu", script, seconds=120)
    assert time.monotonic() - start < 90
    assert run.status == status, run.stderr
    lines = run.error_lines
    assert sum(re.match(block, line) is not None for line in lines) == 1, run.stderr
    assert lines[-1].startswith(summary), run.stderr
    assert "Traceback" not in run.stderr
    assert len(lines) <= 4


def test_a_rank_that_waits_is_stopped_at_once_and_says_so(tmp_path: Path) -> None:
    """Rank 0 is inside a collective that never ends: no Python signal handler would run."""
    script = write(
        tmp_path,
        "waits.py",
        """
        import os, time
        import torch.distributed as dist
        from megatron_seqpar.errors import SeqParError
        from megatron_seqpar.launcher import failures

        dist.init_process_group("gloo")
        dist.barrier()
        if dist.get_rank() == 1:
            # leave without closing the connection, so that rank 0 goes on waiting
            failures.leave = lambda code: time.sleep(0.5) or os._exit(code)
            raise SeqParError("rank 1 gives up")
        while True:
            time.sleep(60)
        """,
    )
    run = run_launcher("--nproc=2", "--device=cpu", script, seconds=120)
    assert run.status == 1
    assert "[rank 0/2] stopped: another rank failed, or the run was cancelled" in run.stderr
    assert "[rank 1/2] error: rank 1 gives up" in run.stderr


@pytest.mark.parametrize(
    ("sayer", "stop", "failure", "line"),
    [
        ("report", "SIGTERM", "SeqParError('too long')", "[rank 0/1] error: too long"),
        ("say", "SIGINT", "KeyboardInterrupt", "[rank 0/1] interrupted"),
    ],
)
def test_a_rank_that_is_stopped_while_it_says_why_still_says_it(
    sayer: str, stop: str, failure: str, line: str, tmp_path: Path
) -> None:
    """On a busy machine torchrun may stop a rank, or pass Ctrl-C on to it, in mid-sentence."""
    script = write(
        tmp_path,
        "slow.py",
        f"""
        import os, signal, time
        from megatron_seqpar.errors import SeqParError
        from megatron_seqpar.launcher import failures

        quick = failures.{sayer}

        def slow(said):
            os.kill(os.getpid(), signal.{stop})
            time.sleep(0.5)
            quick(said)

        failures.{sayer} = slow
        raise {failure}
        """,
    )
    run = run_launcher("--device=cpu", script)
    assert run.status != 0
    assert run.error_lines == [line], run.stderr
    assert "Traceback" not in run.stderr


def test_an_error_of_the_scripts_own_keeps_its_traceback(tmp_path: Path) -> None:
    script = write(tmp_path, "bug.py", "def f():\n    return {}['key']\n\nf()\n")
    run = run_launcher("--device=cpu", script)
    assert run.status == 1
    assert f'File "{script}", line 2, in f' in run.stderr
    assert "KeyError: 'key'" in run.stderr
    assert "runpy" not in run.stderr
    assert "launcher" not in run.stderr


@pytest.mark.parametrize(
    ("processes", "arguments", "message"),
    [
        (
            2,
            ["--tensor-model-parallel-size", "3"],
            "world size (2) is not divisible by total_model_size",
        ),
        pytest.param(
            2,
            ["--data-path", "/no/such/corpus"],
            ".idx and .bin files cannot be found at the path prefix /no/such/corpus",
            marks=pytest.mark.slow,
        ),
        (
            1,
            ["--fp8-format", "hybrid"],
            "--fp8-format needs a GPU and this run has none; use --bf16",
        ),
        (1, ["--num-layer", "2"], "arguments: --num-layer 2; did you mean --num-layers?"),
    ],
    ids=["world-size", "dataset", "fp8", "misspelt"],
)
def test_what_megatron_refuses_is_a_line_a_rank(
    processes: int, arguments: list[str], message: str
) -> None:
    shared = [each for each in TINY if each != "--mock-data" or "--data-path" not in arguments]
    run = run_launcher(f"--nproc={processes}", str(SCRIPT), *shared, *arguments)
    assert run.status in (1, 2)
    said = [line for line in run.error_lines if line.startswith("[rank ")]
    assert {line[:10] for line in said} == {f"[rank {i}/{processes}]" for i in range(processes)}
    assert any(message in line for line in said), run.stderr
    assert all(message in line or "stopped:" in line for line in said), run.stderr
    assert len(run.error_lines) <= 5
    assert "Traceback" not in run.stderr


def test_the_script_gets_the_launchers_interpreter(tmp_path: Path) -> None:
    script = write(tmp_path, "who.py", "import sys\nprint('EXE', sys.executable)\n")
    run = run_launcher("--device=cpu", script)
    assert f"EXE {sys.executable}" in run.stdout


def test_an_interrupt_is_a_line_a_rank(tmp_path: Path) -> None:
    waits = """
        import os
        import time
        import torch.distributed as dist

        dist.init_process_group("gloo")
        os.write(1, b"READY\\n")  # at once: the ranks share the pipe
        if dist.get_rank() == 0:
            time.sleep(60)
        dist.barrier()
    """
    script = write(tmp_path, "waits.py", waits)
    command = [sys.executable, "-m", "megatron_seqpar", "run", "--no-plugin", "--nproc=2", script]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == process.stdout.readline() == "READY\n"
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C in a terminal does
        assert process.wait(60) == 130
        lines = process.stderr.read().splitlines()
    assert "[rank 0/2] interrupted" in lines
    assert lines[-1] == "megatron-seqpar: stopped by SIGINT; all ranks stopped"
    assert not any("Traceback" in line for line in lines), lines
