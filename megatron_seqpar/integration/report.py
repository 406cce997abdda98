# SPDX-License-Identifier: Apache-2.0
"""The report of a run: what each step gave, what it cost, in one JSON file.

Wraps Megatron's `train_step` and `train`. Per step: the loss and the gradient norm in full
precision (the log rounds them, and prints a mean over the steps since the last line), and the
time of the slowest rank. Per rank: peak memory and bytes sent in training steps. The last
pipeline stage alone knows the loss, so the ranks' records are gathered when training ends and
rank 0 writes the file. Works with and without a sequence-parallel axis.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core import package_info, parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.training import get_args
from megatron.training.training import num_floating_point_operations

import megatron_seqpar
from megatron_seqpar import cpu_runtime
from megatron_seqpar.errors import SeqParError
from megatron_seqpar.integration import axis, measure, offload
from megatron_seqpar.integration import steps as training_steps
from megatron_seqpar.telemetry.memory import memory_use
from megatron_seqpar.telemetry.traffic import Traffic, TrafficMeter

FORMAT = 1
UNTIMED_STEPS = 1  # the first step allocates, connects and warms caches
LOSS_KEY = "lm loss"
STEP_PREFIX = "[seqpar]"


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
            tokens = _tokens_per_step()
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
                print(step_line(self.steps[-1], get_args().train_iters), flush=True)
            return result

        return train_step

    def train(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Megatron's `train`; the report is written when it ends, also by an orderly exit."""

        def train(*args: Any, **kwargs: Any) -> Any:
            try:
                result = original(*args, **kwargs)
            except SystemExit as leaving:
                if not leaving.code:  # --exit-interval and the like: all ranks leave together
                    self.finish()
                raise
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
            "steps": [asdict(step) for step in self.steps],
        }
        ranks: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(ranks, record)
        if record["rank"] == 0:
            report = build(ranks)
            write(report, self.path)
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
    seconds = statistics.median(step["seconds"] for step in timed) if timed else None
    bytes_per_step = statistics.median(step["bytes_sent"] for step in timed) if timed else None
    waited, computed = (
        statistics.median(step[name] for step in timed) if timed else None
        for name in ("attention_wait_seconds", "attention_compute_seconds")
    )
    return {
        "format": FORMAT,
        "versions": _versions(),
        "device": {
            "kind": "cpu" if cpu_runtime.is_active() else "cuda",
            "name": _device_name(),
            "backend": torch.distributed.get_backend(),
            "threads": torch.get_num_threads(),
        },
        "parallel": {
            "world": len(ranks),
            "sequence": getattr(args, "sequence_parallel_size", 1),
            "tensor": parallel_state.get_tensor_model_parallel_world_size(),
            "tensor_sequence": bool(args.sequence_parallel),
            "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
            "data": parallel_state.get_data_parallel_world_size(),
        },
        "model": {
            "layers": args.num_layers,
            "hidden": args.hidden_size,
            "query_heads": args.num_attention_heads,
            "kv_heads": args.num_query_groups or args.num_attention_heads,
            "sequence_length": args.seq_length,
            "dtype": str(args.params_dtype).removeprefix("torch."),
        },
        "plugin": {
            name: value for name, value in sorted(vars(args).items()) if name.startswith("seqpar_")
        },
        "command": sys.argv,
        "summary": {
            "timed_steps": len(timed),
            "seconds_per_step": seconds,
            "tokens_per_second": timed[0]["tokens"] / seconds if seconds else None,
            # what Megatron divides by time and ranks for the throughput it logs
            "floating_point_operations_per_step": num_floating_point_operations(
                args, args.global_batch_size
            ),
            "attention_wait_seconds_per_step": waited,
            "attention_compute_seconds_per_step": computed,
            "peak_memory_bytes": max(record["peak_memory_bytes"] for record in ranks),
            "bytes_sent_per_rank_and_step": (
                None if bytes_per_step is None else bytes_per_step / len(ranks)
            ),
        },
        "steps": steps,
        "ranks": [{k: v for k, v in record.items() if k != "steps"} for record in ranks],
    }


def write(report: dict[str, Any], path: Path) -> None:
    """Write `report` to `path`: wholly or not at all."""
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def summary(report: dict[str, Any], path: Path) -> str:
    """A few lines for the terminal."""
    parallel, model, numbers = report["parallel"], report["model"], report["summary"]
    steps = report["steps"]
    axes = ", ".join(
        f"{name} {parallel[name]}" for name in ("sequence", "tensor", "pipeline", "data")
    )
    lines = [
        "",
        f"run of {len(steps)} steps on {parallel['world']} ranks ({axes}), "
        f"{model['sequence_length']:,} tokens a sequence, {model['dtype']}, "
        f"{report['device']['name']}",
    ]
    if steps:
        first, last = steps[0], steps[-1]
        lines.append(
            f"  loss            {first['loss']:.6f} at step {first['iteration']}, "
            f"{last['loss']:.6f} at step {last['iteration']}"
            if first["loss"] is not None
            else "  loss            not reported by the script under 'lm loss'"
        )
    if numbers["seconds_per_step"] is not None:
        lines.append(
            f"  step            {numbers['seconds_per_step']:.3f} s, "
            f"{numbers['tokens_per_second']:,.0f} tokens/s (median of {numbers['timed_steps']})"
        )
        lines.append(
            f"  sent            {numbers['bytes_sent_per_rank_and_step'] / 2**20:,.2f} MiB "
            "a rank and step"
        )
    if numbers["attention_compute_seconds_per_step"]:
        lines.append(
            f"  attention       {numbers['attention_compute_seconds_per_step']:.3f} s computing, "
            f"{numbers['attention_wait_seconds_per_step']:.3f} s waiting a step"
        )
    lines.append(
        f"  peak memory     {numbers['peak_memory_bytes'] / 2**20:,.0f} MiB on the fullest rank "
        f"({report['ranks'][0]['memory']})"
    )
    lines.append(f"  report          {path}")
    return "\n".join(lines)


def step_line(step: Step, total: int | None) -> str:
    """One line for the terminal; the loss is this step's own, unlike that of Megatron's log."""
    of = "" if total is None else f"/{total}"
    values = [f"step {step.iteration}{of}"]
    if step.loss is not None:
        values.append(f"loss {step.loss:.6f}")
    if step.grad_norm is not None:
        values.append(f"grad norm {step.grad_norm:.4f}")
    values += [f"{step.seconds:.3f} s", f"{step.tokens / step.seconds:,.0f} tokens/s"]
    return f"{STEP_PREFIX} {', '.join(values)}"


def _speaks_for_the_batch() -> bool:
    """True on one rank that knows the loss: the first of the last pipeline stage."""
    return (
        parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        and parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    )


def _tokens_per_step() -> int:
    args = get_args()
    sequences = get_num_microbatches() * args.micro_batch_size * args.data_parallel_size
    return int(sequences * args.seq_length)


def _synchronize() -> None:
    if not cpu_runtime.is_active():
        torch.cuda.synchronize()


def _plain(traffic: dict[str, Traffic]) -> dict[str, dict[str, int]]:
    return {name: asdict(value) for name, value in sorted(traffic.items())}


def _attention_counts() -> dict[str, Any] | None:
    """What this rank's attention sent and computed over the axis; None without an axis."""
    transport = axis.current().transport if axis.initialized() else None
    return None if transport is None else transport.counters.as_dict()


def _versions() -> dict[str, str]:
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "megatron-core": package_info.__version__.split("+")[0],  # less the commit of the folder
        "megatron_seqpar": megatron_seqpar.__version__,
    }
    for name in ("transformer-engine", "flash-attn"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _device_name() -> str:
    if cpu_runtime.is_active():
        return f"CPU {platform.machine()}, {os.cpu_count()} cores"
    return torch.cuda.get_device_name()
