# SPDX-License-Identifier: Apache-2.0
"""Run a job to its end and say how it went: ok, oom or error.

The job's processes go when this one does, also when it is killed: its launcher gets SIGTERM from
the system (Linux) and ends its ranks.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_seqpar.experiments.job import Job, environment_of

Status = Literal["ok", "oom", "error"]
STEP_PREFIX = "[seqpar]"  # starts each line that the report prints for a step
TAIL_LINES = 60
PATIENCE_S = 20.0
_SAID = re.compile(r"(?:\[rank \d+/\d+\]|megatron-seqpar:) error: (?P<text>.+)")
_OUT_OF_MEMORY = re.compile(
    r"can't allocate memory|cannot allocate memory|out of memory|bad_alloc|memoryerror"
    r"|killed by sigkill|outofmemoryerror",
    re.IGNORECASE,
)
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        status: ok, oom (no memory for it) or error.
        reason: why it is not ok; empty when it is.
        report: what the run's report says when it is ok.
        steps_seen: step lines that it printed.
    """

    status: Status
    reason: str = ""
    report: dict[str, Any] = field(default_factory=dict)
    steps_seen: int = 0


def execute(job: Job, folder: Path, show: Callable[[str], None]) -> Outcome:
    """Run `job`; its output goes to `<folder>/log.txt`, its report to `<folder>/report.json`.

    `show` gets one line a step. An interrupt ends the ranks before it passes on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    report = folder / "report.json"
    report.unlink(missing_ok=True)
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    seen, late = 0, threading.Event()
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            job.command(report.absolute()),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment_of(job, os.environ),
            text=True,
            errors="replace",
            start_new_session=True,  # so that its ranks can be ended with it
            preexec_fn=_before(job.limit_bytes),
        )
        assert process.stdout is not None
        timer = _end_after(process, job.seconds, late)
        try:
            for line in process.stdout:
                log.write(line)
                log.flush()
                tail.append(line.rstrip())
                if STEP_PREFIX in line:
                    seen += 1
                    show(line.split(STEP_PREFIX, 1)[1].strip())
            status = process.wait()
        except BaseException:
            end(process)
            raise
        finally:
            if timer is not None:
                timer.cancel()
    if late.is_set():
        return Outcome("error", f"timeout: took longer than {job.seconds:g} s", steps_seen=seen)
    return outcome_of(status, report, tail, seen)


def outcome_of(status: int, report: Path, lines: Iterable[str], steps_seen: int) -> Outcome:
    """How a run ended that left with `status` and said `lines` (the last of them, at least)."""
    if status == 0 and report.is_file():
        return Outcome("ok", "", json.loads(report.read_text(encoding="utf-8")), steps_seen)
    if status == 0:
        why = "ended without a report: did it train a step?"
        return Outcome("error", why, steps_seen=steps_seen)
    last = list(lines)[-TAIL_LINES:]
    full = next((line for line in last if _OUT_OF_MEMORY.search(line)), None)
    if full is not None:  # the line that says so, not the traceback around it
        return Outcome("oom", full.strip(), steps_seen=steps_seen)
    return Outcome("error", reason(last), steps_seen=steps_seen)


def reason(tail: Iterable[str]) -> str:
    """Why a run failed, from the last lines it wrote.

    The launcher's own errors where there are any, those that all ranks share once; else the lines.
    """
    lines = list(tail)
    said = [_SAID.search(line) for line in lines]
    errors = dict.fromkeys(match["text"] for match in said if match)
    return "\n".join(errors) if errors else "\n".join(lines[-25:])


def end(process: subprocess.Popen[str]) -> None:
    """Ask the process group to stop, then insist."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        os.killpg(process.pid, sign)
        try:
            process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            continue


def _end_after(
    process: subprocess.Popen[str], seconds: float | None, late: threading.Event
) -> threading.Timer | None:
    if seconds is None:
        return None

    def stop() -> None:
        late.set()
        end(process)

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    return timer


def _before(limit_bytes: int) -> Callable[[], None]:
    """What the child does before it becomes the launcher."""
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
    parent = os.getpid()

    def prepare() -> None:
        if prctl is not None:
            prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:  # it went before the line above
                os._exit(1)
        if limit_bytes:
            resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))

    return prepare
