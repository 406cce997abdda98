# SPDX-License-Identifier: Apache-2.0
"""Does attention over several processes give the right numbers, over the real transport?"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from typing import IO, Any

from ...launcher.environment import free_port
from ..finding import Asked, Finding, Status
from ..machine import Machine
from ..tested import pinned, pip_install

NAME = "self-test"
TEST_SECONDS = 90.0


def check(asked: Asked, machine: Machine) -> Finding:
    """Forward and backward by several schedules in `asked.nproc` processes, against fp64."""
    if "error" in machine.stage("torch"):
        return Finding(NAME, Status.ABSENT, "not made: it needs torch", "mend torch first")
    backend = machine.backend(asked.device, asked.nproc)
    if asked.nproc < 1 or (backend == "nccl" and machine.gpus < asked.nproc):
        text = f"not made: {asked.nproc} processes cannot be started"
        return Finding(NAME, Status.ABSENT, text, "mend what stands above first")
    begin = time.perf_counter()
    results, failures = run(asked.nproc, backend, machine)
    seconds = time.perf_counter() - begin
    where = f"{asked.nproc} processes over {backend}"
    if failures:
        stuck = any("did not end" in why for why in failures)
        debug = "NCCL_DEBUG=INFO" if backend == "nccl" else "GLOO_SOCKET_IFNAME=lo"
        if stuck or any("onnect" in why for why in failures):
            fix = f"export {debug} (the network interface that ranks use), then doctor again"
        else:
            fix = pip_install(pinned("torch"), again=True)
        return Finding(NAME, Status.PROBLEM, f"{where}: {failures[0]}", fix, tuple(failures[1:]))
    assert results is not None
    details = tuple(
        f"{case['name']}: {case['what']} {case['value']:.2g}, at most {case['limit']:.2g}"
        for case in results["cases"]
    )
    wrong = [case for case in results["cases"] if not case["right"]]
    data = {"seconds": seconds, "backend": backend, **results}
    if wrong:
        text = f"{where}: wrong numbers in {', '.join(case['name'] for case in wrong)}"
        kernel = f"export NCCL_P2P_DISABLE=1, or --seqpar-kernel other than {results['kernel']}"
        fix = kernel if backend == "nccl" else pip_install(pinned("torch"), again=True)
        return Finding(NAME, Status.PROBLEM, text, fix, details, data)
    text = f"{where}: {len(results['cases'])} comparisons with fp64 are right, {seconds:.0f} s"
    return Finding(NAME, Status.OK, text, details=details, data=data)


def run(nproc: int, backend: str, machine: Machine) -> tuple[dict[str, Any] | None, list[str]]:
    """(what rank 0 found, nothing) or (None, why not, of each rank that failed)."""
    # a doctor inside of a job must not take that job's variables for its own
    outside = {k: v for k, v in machine.environ.items() if not k.startswith("TORCHELASTIC_")}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    meeting["WORLD_SIZE"] = meeting["LOCAL_WORLD_SIZE"] = str(nproc)
    command = [sys.executable, "-m", "megatron_seqpar.doctor.self_test", backend]
    ranks: list[tuple[subprocess.Popen[bytes], IO[str]]] = []
    with contextlib.ExitStack() as files:
        told = files.enter_context(tempfile.TemporaryFile("w+"))
        try:
            for rank in range(nproc):
                place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                environment = {**outside, **meeting, **place}
                environment.setdefault("OMP_NUM_THREADS", "1")
                output = told if rank == 0 else subprocess.DEVNULL
                errors = files.enter_context(tempfile.TemporaryFile("w+"))
                process = subprocess.Popen(command, env=environment, stdout=output, stderr=errors)
                ranks.append((process, errors))
            failures = _wait(ranks)
        finally:
            for process, _ in ranks:
                process.kill()
                process.wait()
        if failures:
            return None, failures
        told.seek(0)
        return json.loads(told.read().strip().splitlines()[-1]), []


def _wait(ranks: list[tuple[subprocess.Popen[bytes], IO[str]]]) -> list[str]:
    """Wait until all ranks have ended or one has failed; why, of each that failed."""
    end = time.monotonic() + TEST_SECONDS
    while time.monotonic() < end:
        codes = [process.poll() for process, _ in ranks]
        if any(code not in (None, 0) for code in codes):
            return [
                f"rank {rank} {_why(code, errors)}"
                for rank, (code, (_, errors)) in enumerate(zip(codes, ranks, strict=True))
                if code
            ]
        if all(code == 0 for code in codes):
            return []
        time.sleep(0.05)
    waiting = [str(rank) for rank, (process, _) in enumerate(ranks) if process.poll() is None]
    return [f"ranks {', '.join(waiting)} did not end in {TEST_SECONDS:.0f} s"]


def _why(code: int, errors: IO[str]) -> str:
    errors.seek(0)
    lines = errors.read().strip().splitlines()
    ended = f"was killed by {signal.Signals(-code).name}" if code < 0 else "failed"
    return f"{ended}: {lines[-1]}" if lines else ended
