# SPDX-License-Identifier: Apache-2.0
"""What checks look at, each looked at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from ..simulate.topology import Topology, detect

PROBE_SECONDS = 180.0
STAGES = ("torch", "kernels", "megatron")


class Machine:
    """This machine as the doctor sees it.

    environ: the environment of the runs that are asked about.
    """

    def __init__(self, environ: Mapping[str, str] | None = None) -> None:
        self.environ = dict(os.environ if environ is None else environ)

    @cached_property
    def probe(self) -> dict[str, dict[str, Any]]:
        """What importing gave, by stage: facts, or "error" and perhaps "module", the missing one.

        A stage that killed the process has an error too, and those after it are missing.
        """
        return run_probe(self.environ)

    @cached_property
    def topology(self) -> Topology:
        """The GPUs that NVML finds."""
        return detect(environ=self.environ)

    def stage(self, name: str) -> dict[str, Any]:
        """The facts of a stage of the probe; {"error": ...} when there are none."""
        return self.probe.get(name, {"error": "not looked at: what came before it failed"})

    @property
    def gpus(self) -> int:
        """GPUs that torch can use."""
        return len(self.stage("torch").get("gpus", ()))

    @property
    def has_nvidia_device(self) -> bool:
        """Whether the driver shows a GPU, whatever torch makes of it."""
        return any(Path("/dev").glob("nvidia[0-9]*"))

    def backend(self, device: str, nproc: int) -> str:
        """ "nccl" where each of `nproc` processes gets a GPU, else "gloo"."""
        if device == "cuda" or (device == "auto" and self.gpus >= nproc):
            return "nccl"
        return "gloo"


def run_probe(environ: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Run `probe_child` and read what it says."""
    command = [sys.executable, "-m", "megatron_seqpar.doctor.probe_child"]
    try:
        done = subprocess.run(
            command, env=dict(environ), capture_output=True, text=True, timeout=PROBE_SECONDS
        )
    except subprocess.TimeoutExpired as late:
        output = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
        return _stages(output, f"took more than {PROBE_SECONDS:.0f} s")
    why = ""
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        why = f"{_ending(done.returncode)}{': ' + lines[-1] if lines else ''}"
    return _stages(done.stdout, why)


def _stages(output: str, why: str) -> dict[str, dict[str, Any]]:
    """Stages by name; the first that did not get to speak has `why` as its error, if there is."""
    found: dict[str, dict[str, Any]] = {}
    for line in output.splitlines():
        if line.startswith("{"):
            facts = json.loads(line)
            found[facts.pop("stage")] = facts
    missing = next((name for name in STAGES if name not in found), None)
    if why and missing is not None:
        found[missing] = {"error": f"importing it {why}"}
    return found


def _ending(code: int) -> str:
    """'ended with status 1' or 'was killed by SIGSEGV'."""
    return (
        f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    )
