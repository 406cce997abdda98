# SPDX-License-Identifier: Apache-2.0
"""Run one training, showing its steps as they come; reuse a finished run that is the same."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_seqpar.errors import SeqParError
from megatron_seqpar.quickstart.machine import Machine
from megatron_seqpar.quickstart.plan import Run

STEP_PREFIX = "[seqpar]"  # starts each line that the report prints for a step
TAIL_LINES = 25
REPORT = "report.json"
_ERROR = re.compile(r"(\[rank \d+/\d+\]|megatron-seqpar:) error: (?P<text>.+)")


def run_key(run: Run, machine: Machine, sources: Sequence[Path], data: str) -> str:
    """A hash of all that decides what a run gives.

    That is the command, the versions, the device, the plugin's and the script's source, and `data`,
    which identifies the corpus.
    """
    digest = hashlib.sha256()
    versions = [importlib.metadata.version(name) for name in ("torch", "megatron-core")]
    words = [machine.device, machine.name, str(run.ranks), *versions, data, *run.arguments]
    digest.update("\0".join(words).encode())
    for source in sources:
        files = sorted(source.rglob("*.py")) if source.is_dir() else [source]
        for path in files:
            if path.parent != Path(__file__).parent:  # how results are shown does not matter
                digest.update(path.read_bytes())
    return digest.hexdigest()


def finished(folder: Path, key: str) -> dict[str, Any] | None:
    """The report of a run that ended and has this key, else None."""
    try:
        if (folder / "key").read_text(encoding="utf-8").strip() != key:
            return None
        report: dict[str, Any] = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return report


def launch_command(run: Run, machine: Machine, script: Path, report: Path) -> list[str]:
    """The command line that trains `run` and leaves its report."""
    return [
        sys.executable,
        "-m",
        "megatron_seqpar",
        "run",
        "--nproc",
        str(run.ranks),
        "--device",
        machine.device,
        str(script),
        *run.arguments,
        "--seqpar-report",
        str(report),
    ]


def train(
    label: str,
    command: list[str],
    environment: dict[str, str],
    folder: Path,
    key: str,
    show: Callable[[str], None],
) -> dict[str, Any]:
    """Run `command` to its end and return the report it wrote to `<folder>/report.json`.

    `show` gets one line a step; the whole output goes to `<folder>/log.txt`. Raises SeqParError
    with the end of that output when the run fails; an interrupt ends the ranks before it passes on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    report = folder / REPORT
    for stale in (report, folder / "key"):
        stale.unlink(missing_ok=True)
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        text=True,
        errors="replace",
        start_new_session=True,  # so that its ranks can be ended with it
    )
    assert process.stdout is not None
    try:
        with (folder / "log.txt").open("w", encoding="utf-8") as log:
            for line in process.stdout:
                log.write(line)
                log.flush()
                tail.append(line.rstrip())
                if STEP_PREFIX in line:
                    show(line.split(STEP_PREFIX, 1)[1].strip())
        status = process.wait()
    except BaseException:
        _end(process)
        raise
    if status != 0 or not report.is_file():
        raise SeqParError(
            f"the run {label} failed with status {status} (all it said is in "
            f"{folder / 'log.txt'}):\n{reason(tail)}"
        )
    (folder / "key").write_text(key + "\n", encoding="utf-8")
    result: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return result


def reason(tail: Iterable[str]) -> str:
    """Why a run failed, from the last lines it wrote.

    The launcher's own errors where there are any, those that all ranks share once; else the lines.
    """
    said = [_ERROR.match(line) for line in tail]
    errors = dict.fromkeys(match["text"] for match in said if match)
    return "\n".join(errors) if errors else "\n".join(tail)


def _end(process: subprocess.Popen[str], patience: float = 20.0) -> None:
    """Ask the process group to stop, then insist."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        os.killpg(process.pid, sign)
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
