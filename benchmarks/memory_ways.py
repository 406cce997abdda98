# SPDX-License-Identifier: Apache-2.0
"""Ways to spend memory in training, and one training run of such a way."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_seqpar.mfu import read_flags
from megatron_seqpar.quickstart.machine import Machine
from megatron_seqpar.quickstart.plan import FUSED_KERNELS, Run, Training
from megatron_seqpar.quickstart.runs import launch_command, reason

HERE = Path(__file__).resolve().parent
SCRIPT = HERE.parent / "scripts" / "pretrain_gpt.py"
MIB = 2**20
FULL = (
    *("--recompute-granularity", "full"),
    *("--recompute-method", "uniform"),
    *("--recompute-num-layers", "1"),
)
OURS = ("--seqpar-recompute", "attention-output")
OUT_OF_MEMORY = (
    "can't allocate memory",
    "out of memory",
    "cannot allocate memory",
    "bad_alloc",
    "memoryerror",
    "killed by sigkill",
)


@dataclass(frozen=True)
class Way:
    """Arguments of one way; `stock` uses Megatron's own attention, `gpu` needs one."""

    arguments: tuple[str, ...]
    stock: bool = False
    gpu: bool = False


def chunked(pieces: int) -> tuple[str, ...]:
    """MLPs and the loss in so many pieces."""
    return ("--seqpar-mlp-chunks", str(pieces), "--seqpar-loss-chunks", str(pieces))


def ways(pieces: int) -> dict[str, Way]:
    """All ways, by the name they have in tables and pictures."""
    mini = chunked(pieces)
    return {
        "stock": Way((), stock=True),
        "stock, full recompute": Way(FULL, stock=True),
        "none": Way(()),
        "full recompute": Way(FULL),
        "attention-output": Way(OURS),
        "full recompute + mini-sequence": Way((*FULL, *mini)),
        "attention-output + mini-sequence": Way((*OURS, *mini)),
        "attention-output + mini-sequence + offload": Way(
            (*OURS, *mini, "--seqpar-offload", "stash"), gpu=True
        ),
    }


def way_arguments(way: Way, device: str, ranks: int) -> list[str]:
    """Megatron's and our arguments of a way, on `ranks` ranks of the axis."""
    arguments = list(way.arguments)
    if not way.stock:
        arguments += ["--seqpar-kernel", FUSED_KERNELS[device]]
    if ranks > 1:
        arguments += ["--sequence-parallel-size", str(ranks)]
    return arguments


def unfused_gib(model: Path, length: int, full: bool) -> float:
    """Scores, probabilities and their gradients of stock unfused attention, fp32.

    Every layer keeps a matrix unless it is computed again; five live at once in backward.
    """
    values = read_flags(model)
    layers = 0 if full else int(values["num-layers"])
    matrices = 5 + 2 * layers
    return matrices * int(values["num-attention-heads"]) * length * length * 4 / 2**30


@dataclass(frozen=True)
class Outcome:
    """What a run gave. status: 'ok', 'oom', 'too slow' or 'error'; `report` only when ok."""

    status: str
    report: dict[str, Any]
    account: int | None = None
    text: str = ""


def run(
    name: str,
    way: Way,
    training: Training,
    here: Machine,
    folder: Path,
    *,
    cap_mib: int = 0,
    accounted: bool = False,
    seconds: float | None = None,
    environment: dict[str, str] | None = None,
) -> Outcome:
    """Train one way through the launcher and wait, `seconds` at most."""
    folder.mkdir(parents=True, exist_ok=True)
    report, account = folder / "report.json", folder / "account.json"
    for stale in folder.glob("*.json"):
        stale.unlink()
    arguments = [*training.arguments(), *way_arguments(way, here.device, here.ranks)]
    job = Run(name, name, "", here.ranks, tuple(arguments))
    command = launch_command(job, here, HERE / "memory_rank.py", report)
    place = command.index(str(HERE / "memory_rank.py")) + 1
    command[place:place] = [str(cap_mib), str(account) if accounted else "-", str(SCRIPT)]
    with subprocess.Popen(
        command,
        env={**here.environment(), "OMP_NUM_THREADS": "1", **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            text, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.terminate()  # the launcher ends its ranks
            process.communicate()
            return Outcome("too slow", {})
    if process.returncode == 0 and report.is_file():
        taken = [
            json.loads(file.read_text())["peak_bytes"] for file in folder.glob("account.*.json")
        ]
        return Outcome("ok", json.loads(report.read_text()), max(taken, default=None))
    status = "oom" if any(words in text.lower() for words in OUT_OF_MEMORY) else "error"
    return Outcome(status, {}, text=reason(text.splitlines()[-40:]))


def figures(outcome: Outcome) -> dict[str, Any]:
    """The numbers of a finished run that tables and pictures show."""
    grown = [r["peak_memory_bytes"] - r["start_memory_bytes"] for r in outcome.report["ranks"]]
    summary = outcome.report["summary"]
    return {
        "seconds": summary["seconds_per_step"],
        "tokens_per_second": summary["tokens_per_second"],
        "peak_memory_bytes": summary["peak_memory_bytes"],
        "memory_since_start_bytes": max(grown),
        "losses": [step["loss"] for step in outcome.report["steps"]],
    }
