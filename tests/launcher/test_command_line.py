# SPDX-License-Identifier: Apache-2.0
"""What the command line accepts and what it makes of it; starts no training."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_seqpar import launcher
from megatron_seqpar.cli import app
from megatron_seqpar.errors import SeqParError
from megatron_seqpar.launcher.torchrun import describe_exit, torchrun_arguments


def invoke(*arguments: str, environment: dict[str, str] | None = None) -> tuple[int, str, object]:
    cleared = {"RANK": None, "WORLD_SIZE": None, **(environment or {})}
    result = CliRunner().invoke(app, list(arguments), env=cleared)
    return result.exit_code, result.output, result.exception


def _seconds_of_children() -> float:
    """Processor time of processes that ended: the clock also counts whatever else runs."""
    times = os.times()
    return times.children_user + times.children_system


def test_help_is_fast_and_needs_no_torch() -> None:
    code = (
        "import sys\nfrom megatron_seqpar.cli import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: print([m for m in ('torch', 'megatron') if m in sys.modules])"
    )
    seconds = []
    for _ in range(3):
        start = _seconds_of_children()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        seconds.append(_seconds_of_children() - start)
    assert done.stdout.strip().endswith("[]"), done.stdout + done.stderr
    assert "run" in done.stdout
    # well below 0.5 s where nothing else runs
    assert min(seconds) < 2.0


def test_a_model_file_goes_before_the_scripts_own_arguments() -> None:
    status, output, _ = invoke(
        *("run", "--device", "cpu", "--dry-run", "--no-check", "--model", "llama3-8b"),
        *("train.py", "--num-layers", "2"),
    )
    assert status == 0
    words = shlex.split(output)
    assert words[words.index("train.py") + 1 : words.index("train.py") + 3] == [
        *("--num-layers", "32")
    ]
    assert words[-2:] == ["--num-layers", "2"], "what comes later wins"
    status, _, error = invoke("run", "--dry-run", "--model", "llama9", "train.py")
    assert status != 0
    assert "llama3-8b" in str(error), "the models there are"


def test_dry_run_prints_the_torchrun_command() -> None:
    status, output, _ = invoke(
        *("run", "--nproc", "4", "--device", "cpu", "--dry-run", "--no-check"),
        *("train.py", "--lr", "1e-3", "--note", "two words", "--help"),
    )
    assert status == 0
    assert shlex.split(output) == [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"),
        *("-m", "megatron_seqpar", "run", "--device=cpu"),
        *("train.py", "--lr", "1e-3", "--note", "two words", "--help"),
    ]


def test_options_of_torchrun_are_passed_on() -> None:
    options = "--nnodes 2 --node-rank 1 --master-addr host7 --master-port 29511"
    status, output, _ = invoke(
        *("run", "--nproc", "8", "--torchrun-args", options, "--no-plugin"),
        *("--dry-run", "--no-check", "t.py"),
    )
    assert status == 0
    words = shlex.split(output)
    assert "--standalone" not in words
    assert words[3:] == [
        *shlex.split(options),
        *("--nproc-per-node=8", "-m", "megatron_seqpar", "run"),
        *("--device=auto", "--no-plugin", "t.py"),
    ]


def test_standalone_unless_a_meeting_point_is_named() -> None:
    assert torchrun_arguments("t.py", [], 2, torchrun_args=["--log-dir=x"])[0] == "--standalone"
    assert "--standalone" not in torchrun_arguments(
        "t.py", [], 2, torchrun_args=["--rdzv-endpoint=h:1"]
    )


def test_several_nodes_without_a_file() -> None:
    status, output, _ = invoke(
        *("run", "--nodes", "2", "--node-rank", "1", "--master-addr", "n0", "--nproc", "4"),
        *("--dry-run", "--no-check", "t.py"),
    )
    assert status == 0
    assert shlex.split(output)[3:8] == [
        *("--nnodes=2", "--node-rank=1", "--master-addr=n0", "--master-port=29500"),
        "--nproc-per-node=4",
    ]


def test_a_dry_run_checks_a_script_that_is_there() -> None:
    status, _, error = invoke("run", "--dry-run", "no/such.py")
    assert status == 1
    assert "script 'no/such.py' does not exist" in str(error)
    status, _, error = invoke("run")
    assert status == 1
    assert "SCRIPT is missing" in str(error)


def test_a_missing_script_is_named() -> None:
    status, _, error = invoke("run", "--nproc", "2", "no/such.py")
    assert status == 1
    assert isinstance(error, SeqParError)
    assert "script 'no/such.py' does not exist" in str(error)


def test_errors_are_one_line_with_status_2() -> None:
    command = [sys.executable, "-m", "megatron_seqpar", "run", "--nproc", "2", "no/such.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("megatron-seqpar: error: script 'no/such.py' does not exist")


def test_a_folder_is_no_script(tmp_path: Path) -> None:
    with pytest.raises(SeqParError, match="is a folder"):
        launcher.launch(tmp_path, [], nproc=2)


def test_nproc_below_one_is_refused() -> None:
    with pytest.raises(SeqParError, match="--nproc 0"):
        launcher.launch(__file__, [], nproc=0)


def test_nproc_under_torchrun_is_refused() -> None:
    torchrun = {"RANK": "0", "WORLD_SIZE": "2"}
    _, _, error = invoke("run", "--nproc", "2", "t.py", environment=torchrun)
    assert isinstance(error, SeqParError)
    assert "torchrun started this process" in str(error)


def test_device_names() -> None:
    with pytest.raises(SeqParError, match="choose one of auto, cuda, cpu"):
        launcher.launch(__file__, [], nproc=1, device="gpu")


@pytest.mark.parametrize(("gpus", "nproc"), [(0, 1), (2, 3)])
def test_more_processes_than_gpus_are_refused(
    gpus: int, nproc: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    message = "3 processes on this machine but 2 GPUs" if gpus else "use --device cpu"
    with pytest.raises(SeqParError, match=message):
        launcher.launch(__file__, [], nproc=nproc, device="cuda")


def test_exit_statuses_are_described() -> None:
    assert describe_exit(1) == "failed with exit code 1"
    assert describe_exit(-9).startswith("was killed by SIGKILL")
    assert describe_exit(-11) == "was killed by SIGSEGV"
