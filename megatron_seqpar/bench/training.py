# SPDX-License-Identifier: Apache-2.0
"""One training run of a benchmark through the launcher, and what came of it.

Also what is known of a run before it starts: whether stock attention could fit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..data import VOCABULARY_SIZE
from ..experiments.execute import Outcome, execute
from ..experiments.job import Job
from ..experiments.layout import STOCK, Layout
from ..experiments.machine import Machine
from ..experiments.numbers import numbers
from ..experiments.store import slug
from ..experiments.training import Training
from ..mfu import Peak, model_flops, model_from_flags, utilization
from .ranks import Row

MIB = 2**20
RANK_SCRIPT = Path(__file__).resolve().parent / "memory_rank.py"
TIMEOUT = "timeout"  # how the reason of a run that took too long begins


@dataclass(frozen=True)
class Way:
    """One way to train: its name in tables and pictures, its layout, and flags of its own.

    gpu: it needs one.
    """

    name: str
    layout: Layout
    more: tuple[str, ...] = ()
    gpu: bool = False

    @property
    def stock(self) -> bool:
        """Whether attention is Megatron's own."""
        return self.layout.kernel == STOCK


def chunked(layout: Layout, chunks: int) -> Layout:
    """The layout with MLPs and the loss in so many pieces."""
    return replace(layout, mlp_chunks=str(chunks), loss_chunks=str(chunks))


@dataclass(frozen=True)
class Trainer:
    """What all runs of a benchmark share but the training itself.

    Attributes:
        machine: device and what Megatron must be told about it; its `ranks` are not used.
        script: the pretraining script.
        folder: of logs and reports.
        environment: variables over this process's own.
        seconds: how long a run may take; None: as long as it takes.
    """

    machine: Machine
    script: Path
    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    seconds: float | None = None

    def run(
        self,
        way: Way,
        training: Training,
        show: Callable[[str], None],
        *,
        cap_mib: int = 0,
        account: Path | None = None,
    ) -> Outcome:
        """Train one way and wait.

        cap_mib, account: see `memory_rank.py`, which then runs the script.
        """
        arguments = [*training.arguments(), *self.machine.arguments(), *way.layout.arguments()]
        arguments += way.more
        script = self.script
        if cap_mib or account is not None:
            wrapped = [str(cap_mib), str(account or "-"), str(script)]
            script, arguments = RANK_SCRIPT, [*wrapped, *arguments]
        job = Job(
            name=way.name,
            ranks=way.layout.ranks,
            arguments=tuple(arguments),
            script=script,
            device=self.machine.device,
            environment=tuple(self.environment.items()),
            seconds=self.seconds,
        )
        place = f"{slug(way.name)}-{training.sequence_length}-{way.layout.ranks}"
        return execute(job, self.folder / "runs" / place, show)


def described(way: Way, outcome: Outcome) -> Row:
    """What a run gave as part of a row: status, and the numbers or why there are none.

    `seconds` is the median of its timed steps.
    """
    if outcome.status != "ok":
        slow = outcome.reason.startswith(TIMEOUT)
        return {"status": "too slow" if slow else outcome.status, "why": outcome.reason}
    found = numbers(outcome.report)
    return {
        "status": "ok",
        "seconds": found["step_time_s"],
        "seconds_by_step": found["seconds"],
        "tokens_per_second": found["tokens_per_s"],
        "peak_memory_bytes": found["peak_memory_bytes"],
        "memory_since_start_bytes": found["memory_since_start_bytes"],
        "memory_kind": found["memory_kind"],
        "bytes_sent_per_step": found["bytes_sent_per_step"],
        "losses": found["losses"],
        "device": found["device"],
        "peak_flops_per_rank": found["peak_flops_per_rank"],
        "dtype": found["dtype"],
        "flags": [*way.layout.arguments(), *way.more],
    }


def rates(training: Training, row: Row, ranks: int, peak: Peak | None) -> Row:
    """Model FLOP/s of a rank and MFU of a finished row, and the peak; None where none is known."""
    values = training.model_flags()
    values.setdefault("vocab-size", VOCABULARY_SIZE)
    model = model_from_flags(values)
    found: Row = {"peak": None if peak is None else asdict(peak)}
    for name, causal in (("", False), ("_causal", True)):
        work = model_flops(model, training.sequence_length, training.batch, causal=causal)
        found[f"model_tflops_per_rank{name}"] = work / row["seconds"] / ranks / 1e12
        found[f"mfu{name}"] = peak and utilization(work, row["seconds"], ranks, peak.value)
    return found


def unfused_gib(values: Mapping[str, Any], length: int, *, full: bool, item: int = 4) -> float:
    """Scores, probabilities and their gradients of stock unfused attention, GiB of all ranks.

    Every layer keeps a matrix unless it is computed again; five live at once in backward.
    """
    layers = 0 if full else int(values["num-layers"])
    matrices = 5 + 2 * layers
    return matrices * int(values["num-attention-heads"]) * length * length * item / 2**30


def left_out(
    way: Way, machine: Machine, training: Training, global_batch: int, limit_gib: float
) -> str | None:
    """Why a way is not run, None where it is.

    limit_gib: memory of all ranks above which unfused attention is not tried. Trying it on a CPU
    would take the whole machine down.
    """
    if way.gpu and machine.device == "cpu":
        return "needs a GPU: on a CPU there is no other memory to put things in"
    values = {"vocab-size": VOCABULARY_SIZE, **training.model_flags()}
    impossible = way.layout.impossible(model_from_flags(values), global_batch)
    if impossible is not None:
        return impossible
    if way.layout.cp > 1 and not machine.has_transformer_engine:
        return "stock context parallelism needs Transformer Engine"
    if way.stock and not machine.has_transformer_engine:
        item = 4 if machine.device == "cpu" else 2
        full = way.layout.recompute == "full"
        needed = unfused_gib(values, training.sequence_length, full=full, item=item)
        devices = 1 if machine.device == "cpu" else way.layout.ranks
        if needed > limit_gib * devices:
            return f"unfused attention needs about {needed:,.0f} GiB"
    return None
