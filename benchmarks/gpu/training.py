# SPDX-License-Identifier: Apache-2.0
"""A few steps of Megatron's own training on the GPU: stock, with the plugin, over two ranks.

The same model, data and seed every time, in bf16; losses must agree. The two ranks share the GPU,
over gloo or NCCL as in `processes`, each started as if alone on its host.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.gpu.environment import found_kernels
from benchmarks.gpu.processes import shared_gpu
from benchmarks.gpu.settings import Outcome, Settings
from megatron_seqpar.data import StandardLibrary, prepare_corpus
from megatron_seqpar.experiments.machine import Machine
from megatron_seqpar.experiments.training import Training, flags
from megatron_seqpar.launcher.environment import free_port

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "pretrain_gpt.py"
MODEL = ROOT / "configs" / "models" / "benchmark.yaml"
TOLERANCE = 5e-3  # relative, of bf16 losses; fp32 ones agree to far less
SAVES_MEMORY = (
    *("--seqpar-recompute", "attention-output", "--seqpar-offload", "stash"),
    *("--seqpar-mlp-chunks", "4", "--seqpar-loss-chunks", "4"),
)
_LOSS = re.compile(r"iteration +(\d+)/.*?lm loss: ([0-9.E+-]+)")


@dataclass(frozen=True)
class Way:
    """One run. `backend` is torch.distributed's, `arguments` come after the shared ones."""

    name: str
    ranks: int
    plugin: bool
    backend: str
    arguments: tuple[str, ...] = ()
    may_be_refused: bool = False


def ways(settings: Settings) -> list[Way]:
    """What is trained; the first is what the others are compared with."""
    backend = "nccl" if settings.on_gpu else "gloo"
    sp2 = ("--sequence-parallel-size", "2")
    found = [Way("stock Megatron", 1, False, backend), Way("plugin, axis off", 1, True, backend)]
    found += [
        Way(f"plugin, {kernel} attention", 1, True, backend, ("--seqpar-kernel", kernel))
        for kernel in found_kernels(settings.device)
    ]
    found.append(Way("plugin, all that saves memory", 1, True, backend, SAVES_MEMORY))
    found.append(Way("SP=2, gloo", 2, True, "gloo", sp2))
    if settings.on_gpu:
        found.append(Way("SP=2, NCCL", 2, True, "nccl", sp2, may_be_refused=True))
    return found


def shared_arguments(settings: Settings) -> list[str]:
    """Megatron's arguments of every run but those of a `Way`."""
    corpus = prepare_corpus(StandardLibrary(), settings.work / "stdlib")
    length = settings.pick(full=2048, quick=1024, tiny=64)
    steps = settings.pick(full=10, quick=6, tiny=3)
    training = Training(MODEL, corpus, settings.work / "cache", steps, length, batch=1)
    here = Machine(settings.device.type, "", 1)
    machine = here.arguments()
    if "--distributed-backend" in machine:  # each way names its own
        at = machine.index("--distributed-backend")
        machine = machine[:at] + machine[at + 2 :]
    return [*training.arguments(), *machine, *flags({"timing-log-level": 0})]


def train(way: Way, arguments: list[str], settings: Settings, seconds: float) -> dict[int, float]:
    """The printed losses by iteration (the second is the mean of the first two).

    Raises RuntimeError with the end of the output when a rank fails or takes too long.
    """
    command = [sys.executable, "-m", "megatron_seqpar", "run", "--device", settings.device.type]
    command += [] if way.plugin else ["--no-plugin"]
    command += [str(SCRIPT), *arguments, "--distributed-backend", way.backend, *way.arguments]
    port = str(free_port())
    processes, logs = [], []
    try:
        for rank in range(way.ranks):
            log = settings.work / f"{way.name.replace(' ', '-')}-{rank}.txt"
            logs.append(log)
            environment = _environment(way, rank, port, settings)
            with log.open("w", encoding="utf-8") as file:
                started = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                    env=environment, cwd=ROOT,
                )  # fmt: skip
            processes.append(started)
        deadline = time.monotonic() + seconds
        statuses = [p.wait(max(0.1, deadline - time.monotonic())) for p in processes]
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"no end after {seconds:.0f} s: {_tail(logs)}") from None
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    if any(statuses):
        raise RuntimeError(f"status {statuses}: {_tail(logs)}")
    printed = "".join(log.read_text(encoding="utf-8", errors="replace") for log in logs)
    return {int(iteration): float(loss) for iteration, loss in _LOSS.findall(printed)}


def _environment(way: Way, rank: int, port: str, settings: Settings) -> dict[str, str]:
    """Each rank as the only one of its host: so two may share a GPU."""
    added = {
        "RANK": str(rank), "WORLD_SIZE": str(way.ranks), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1",
        # compiling the few fused functions would take longer than all the training
        "TORCHDYNAMO_DISABLE": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }  # fmt: skip
    if settings.on_gpu and way.ranks > 1:
        added |= shared_gpu(rank)
    return {**os.environ, **added}


def _tail(logs: list[Path]) -> str:
    lines = [
        line.strip()
        for log in logs
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines()
        if line.strip()
    ]
    errors = [line for line in lines if "rror" in line]
    return " | ".join((errors or lines)[-3:])[-600:]


def run(settings: Settings) -> Outcome:
    """All ways, one after the other."""
    if importlib.util.find_spec("megatron") is None:
        why = "megatron-core is not installed"
        return Outcome(why, left_out=[why], nothing=True)
    outcome = Outcome()
    arguments = shared_arguments(settings)
    losses: dict[str, dict[int, float]] = {}
    for way in ways(settings):
        left = settings.seconds - (time.monotonic() - settings.started)
        if left < settings.pick(full=15.0, quick=15.0, tiny=1.0):
            outcome.left_out.append(f"{way.name}: no time")
            continue
        try:
            losses[way.name] = train(way, arguments, settings, min(left, 120.0))
        except RuntimeError as failure:
            (outcome.left_out if way.may_be_refused else outcome.failures).append(
                f"{way.name}: {failure}"
            )
    outcome.data = {"losses": losses, "tolerance": TOLERANCE}
    if not losses:
        return replace(outcome, says="nothing was trained")
    base, *others = losses.items()
    differences = {name: _difference(curve, base[1]) for name, curve in others}
    outcome.data["largest_relative_difference"] = differences
    outcome.failures += [
        f"{name}: losses differ from those of {base[0]} by {difference:.1e}, over {TOLERANCE:g}"
        for name, difference in differences.items()
        if not difference <= TOLERANCE
    ]
    shown = ", ".join(f"{name} {difference:.1e}" for name, difference in differences.items())
    outcome.says = f"{len(base[1])} steps; losses against {base[0]}: {shown}"
    return outcome


def _difference(curve: dict[int, float], base: dict[int, float]) -> float:
    if curve.keys() != base.keys() or not base:
        return math.inf
    return max(abs(curve[step] - base[step]) / abs(base[step]) for step in base)
