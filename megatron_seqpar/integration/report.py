# SPDX-License-Identifier: Apache-2.0
"""The report of a run: what each step gave, what it cost, in one JSON file.

Wraps Megatron's `train_step` and `train`. Per step: the loss and the gradient norm in full
precision (the log rounds them, and prints a mean over the steps since the last line), and the
time of the slowest rank. Per rank: peak memory and bytes sent in training steps. The last
pipeline stage alone knows the loss, so the ranks' records are gathered when training ends and
rank 0 writes the file. Works with and without a sequence-parallel axis.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.training import get_args
from megatron.training.training import num_floating_point_operations

from megatron_seqpar import cpu_runtime
from megatron_seqpar.errors import SeqParError
from megatron_seqpar.integration import (
    axis,
    device_samples,
    measure,
    offload,
    run_facts,
    state,
    utilization,
)
from megatron_seqpar.integration import steps as training_steps
from megatron_seqpar.integration.closing_text import summary
from megatron_seqpar.integration.closing_text import utilization as utilization_text
from megatron_seqpar.integration.run_facts import UNTIMED_STEPS
from megatron_seqpar.telemetry.memory import memory_use
from megatron_seqpar.telemetry.traffic import Traffic, TrafficMeter

FORMAT = 1
LOSS_KEY = "lm loss"
STEP_PREFIX = "[seqpar]"
_MERGED = ("steps", "notes")
"""Of a rank's record: what the report holds in one place for all ranks."""


@dataclass
class Step:
    """One training step as this rank saw it; the loss is None off the last pipeline stage."""

    iteration: int
    loss: float | None
    grad_norm: float | None
    seconds: float
    tokens: int
    skipped: bool
    bytes_sent: int
    attention_wait_seconds: float
    attention_compute_seconds: float
    attention_bytes_sent: int


@dataclass
class _Recorder:
    """State of one run's report on this rank."""

    path: Path
    steps: list[Step] = field(default_factory=list)
    traffic: TrafficMeter = field(default_factory=TrafficMeter)
    start_memory: int = 0

    def train_step(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Megatron's `train_step`, timed and recorded."""

        def train_step(*args: Any, **kwargs: Any) -> Any:
            tokens = run_facts.tokens_per_step()
            sent_before, attention_before = self.traffic.bytes, measure.current().totals()
            _synchronize()
            start = time.perf_counter()
            with self.traffic.running():
                result = original(*args, **kwargs)
                _synchronize()
            seconds = time.perf_counter() - start
            attention = measure.totals_since(attention_before)
            losses, skipped, grad_norm = result[0], result[1], result[5]
            iteration = kwargs.get("iteration")
            self.steps.append(
                Step(
                    iteration=len(self.steps) + 1 if iteration is None else iteration + 1,
                    loss=float(losses[LOSS_KEY]) if LOSS_KEY in losses else None,
                    grad_norm=None if grad_norm is None else float(grad_norm),
                    seconds=seconds,
                    tokens=tokens,
                    skipped=bool(skipped),
                    bytes_sent=self.traffic.bytes - sent_before,
                    attention_wait_seconds=attention["attention_wait_seconds"],
                    attention_compute_seconds=attention["attention_compute_seconds"],
                    attention_bytes_sent=int(attention["attention_bytes_sent"]),
                )
            )
            if _speaks_for_the_batch():
                world = torch.distributed.get_world_size()
                print(step_line(self.steps[-1], get_args().train_iters, world), flush=True)
            return result

        return train_step

    def train(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Megatron's `train`; the report is written when it ends, also by an orderly exit."""

        def train(*args: Any, **kwargs: Any) -> Any:
            utilization.begin(args, kwargs)
            device_samples.begin()
            try:
                result = original(*args, **kwargs)
            except SystemExit as leaving:
                if not leaving.code:  # --exit-interval and the like: all ranks leave together
                    self.finish()
                raise
            finally:
                device_samples.end()
            self.finish()
            return result

        return train

    def finish(self) -> None:
        """Gather the ranks' records; rank 0 writes the file and prints the summary."""
        use = memory_use()
        record = {
            "rank": torch.distributed.get_rank(),
            "memory": use.kind,
            "start_memory_bytes": self.start_memory,
            "peak_memory_bytes": use.peak,
            "traffic_by_kind": _plain(self.traffic.by_kind),
            "traffic_by_group": _plain(self.traffic.by_group),
            "sp_rank": axis.current().rank if axis.initialized() else 0,
            "attention": _attention_counts(),
            "offload": offload.counts(),
            "telemetry": device_samples.end(),
            **utilization.current().as_record(),
            "steps": [asdict(step) for step in self.steps],
        }
        ranks: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(ranks, record)
        if record["rank"] == 0:
            report = build(ranks)
            write(report, self.path)
            if state.config().summary:
                print(summary(report, self.path), flush=True)


_installed: _Recorder | None = None


def install(path: str | os.PathLike[str]) -> None:
    """Report the coming training run of this process to `path`. A second call changes nothing.

    Raises SeqParError when the folder of `path` cannot be written to.
    """
    global _installed
    if _installed is not None:
        return
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SeqParError(f"--seqpar-report {target}: {error}") from error
    if target.is_dir() or not os.access(target.parent, os.W_OK):
        raise SeqParError(f"--seqpar-report {target}: not a file that can be written")
    _installed = _Recorder(target, start_memory=memory_use().now)
    measure.current().wanted = True
    training_steps.around("train_step", _installed.train_step)
    training_steps.around("train", _installed.train)


def uninstall() -> None:
    """Undo `install`."""
    global _installed
    if _installed is not None:
        training_steps.remove("train_step", _installed.train_step)
        training_steps.remove("train", _installed.train)
        _installed = None


def build(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """The report of the gathered records of all ranks, as plain values.

    Reads Megatron's arguments and parallel state. Seconds of a step are those of the slowest rank
    (those of waiting and computing, of the rank with most), tokens those of the whole batch, bytes
    the sum over ranks.
    """
    args = get_args()
    steps = []
    for seen in zip(*(record["steps"] for record in ranks), strict=True):
        known = [step for step in seen if step["loss"] is not None]
        merged = dict((known or seen)[0])
        for name in ("seconds", "attention_wait_seconds", "attention_compute_seconds"):
            merged[name] = max(step[name] for step in seen)
        for name in ("bytes_sent", "attention_bytes_sent"):
            merged[name] = sum(step[name] for step in seen)
        steps.append(merged)
    timed = steps[UNTIMED_STEPS:]
    rates = run_facts.rates([step["seconds"] for step in timed], [step["tokens"] for step in timed])
    bytes_per_step = statistics.median(step["bytes_sent"] for step in timed) if timed else None
    waited, computed = (
        statistics.median(step[name] for step in timed) if timed else None
        for name in ("attention_wait_seconds", "attention_compute_seconds")
    )
    return {
        "format": FORMAT,
        **run_facts.facts(len(ranks)),
        "summary": {
            "steps": len(steps),
            "timed_steps": rates.steps,
            "seconds_per_step": rates.seconds,
            "tokens_per_second": rates.tokens_per_second,
            # what Megatron divides by time and ranks for the throughput it logs
            "floating_point_operations_per_step": num_floating_point_operations(
                args, args.global_batch_size
            ),
            **utilization.current().summary(rates, ranks, len(ranks)),
            "attention_wait_seconds_per_step": waited,
            "attention_compute_seconds_per_step": computed,
            "peak_memory_bytes": max(record["peak_memory_bytes"] for record in ranks),
            "bytes_sent_per_rank_and_step": (
                None if bytes_per_step is None else bytes_per_step / len(ranks)
            ),
        },
        "steps": steps,
        "ranks": [{k: v for k, v in record.items() if k not in _MERGED} for record in ranks],
    }


def write(report: dict[str, Any], path: Path) -> None:
    """Write `report` to `path`: wholly or not at all."""
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def step_line(step: Step, total: int | None, ranks: int) -> str:
    """One line for the terminal; the loss is this step's own, unlike that of Megatron's log.

    total: steps of the run. ranks: of the world, for MFU.
    """
    of = "" if total is None else f"/{total}"
    values = [f"step {step.iteration}{of}"]
    if step.loss is not None:
        values.append(f"loss {step.loss:.6f}")
    if step.grad_norm is not None:
        values.append(f"grad norm {step.grad_norm:.4f}")
    speed = step.tokens / step.seconds
    values += [f"{step.seconds:.3f} s", f"{speed:,.0f} tokens/s"]
    share = utilization_text(*utilization.current().of(speed, ranks))
    if share is not None:
        values.append(share)
    return f"{STEP_PREFIX} {', '.join(values)}"


def _speaks_for_the_batch() -> bool:
    """True on one rank that knows the loss: the first of the last pipeline stage."""
    return (
        parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        and parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    )


def _synchronize() -> None:
    if not cpu_runtime.is_active():
        torch.cuda.synchronize()


def _plain(traffic: dict[str, Traffic]) -> dict[str, dict[str, int]]:
    return {name: asdict(value) for name, value in sorted(traffic.items())}


def _attention_counts() -> dict[str, Any] | None:
    """What this rank's attention sent and computed over the axis; None without an axis."""
    transport = axis.current().transport if axis.initialized() else None
    return None if transport is None else transport.counters.as_dict()
