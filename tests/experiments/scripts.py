# SPDX-License-Identifier: Apache-2.0
"""Jobs that run a small Python program in the launcher's place."""

import sys
from pathlib import Path

from megatron_seqpar.experiments.job import Job


class Script(Job):
    """A job whose command is `python PROGRAM REPORT`."""

    def command(self, report: Path | str) -> list[str]:
        return [sys.executable, str(self.script), str(report)]


def job(folder: Path, program: str, **changes) -> Script:
    """A job of the program's text."""
    path = folder / "program.py"
    path.write_text(program, encoding="utf-8")
    fields = {"name": "a job", "ranks": 1, "arguments": (), "script": path, "device": "cpu"}
    return Script(**{**fields, **changes})


REPORT = """
import json, sys
traffic = {"send": {"messages": 2, "bytes": 600}, "all_reduce": {"messages": 1, "bytes": 300}}
step = lambda loss, seconds: {"loss": loss, "seconds": seconds, "tokens": 100, "grad_norm": 1.0}
report = {
    "steps": [step(3.0, 9.0), step(2.0, 1.0), step(1.5, 2.0)],
    "ranks": [
        {"memory": "resident", "start_memory_bytes": 100, "peak_memory_bytes": 300,
         "traffic_by_kind": traffic},
        {"memory": "resident", "start_memory_bytes": 100, "peak_memory_bytes": 250,
         "traffic_by_kind": {}},
    ],
    "summary": {"peak_memory_bytes": 300},
    "device": {"kind": "cpu", "name": "CPU", "backend": "gloo", "threads": 1},
    "versions": {"torch": "2.11.0"},
    "model": {"dtype": "float32"},
    "plugin": {"seqpar_report": sys.argv[1], "seqpar_schedule": "auto"},
}
print("[seqpar] step 1/3, loss 3.0")
open(sys.argv[1], "w").write(json.dumps(report))
"""
"""A program that leaves the report of a training run of three steps on two ranks."""
