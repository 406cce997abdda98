# SPDX-License-Identifier: Apache-2.0
"""The project's tests that need a GPU, in one pytest run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu.settings import Outcome, Settings

ROOT = Path(__file__).resolve().parents[2]
_COUNT = re.compile(r"(\d+) (passed|failed|error|skipped)")


def run(settings: Settings) -> Outcome:
    """`pytest -m needs_gpu`; on a GPU at least one must pass."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "needs_gpu",
        "-q",
        "--tb=short",
        *settings.tests,
    ]
    log = settings.work / "tests.txt"
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            timeout=settings.seconds, check=False,
        )  # fmt: skip
    lines = log.read_text(encoding="utf-8").splitlines()
    last = lines[-1] if lines else ""
    counts = {kind: int(number) for number, kind in _COUNT.findall(last)}
    outcome = Outcome(says=last.strip("= "), data={"counts": counts, "status": done.returncode})
    outcome.failures += [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    if done.returncode not in (0, 5) and not outcome.failures:  # 5: there was no such test
        outcome.failures.append(f"pytest ended with status {done.returncode}: {last}")
        outcome.data["tail"] = lines[-40:]
    if settings.on_gpu and not counts.get("passed"):
        outcome.failures.append("no test that needs a GPU passed")
    return outcome
