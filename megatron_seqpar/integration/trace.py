# SPDX-License-Identifier: Apache-2.0
"""`--seqpar-trace`: what every rank does in a training step, in files that Perfetto opens.

A traced step begins with a barrier, from which the ranks count their times, and ends with every
rank writing its file and rank 0 joining those it can see. In between each rank notes micro-batches,
tiles, transfers and waits; nothing is synchronised.
"""

from __future__ import annotations

import os
import platform
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_seqpar import cpu_runtime
from megatron_seqpar.attention.watch import WatchedTransport
from megatron_seqpar.errors import SeqParError
from megatron_seqpar.integration import measure, steps
from megatron_seqpar.telemetry import trace
from megatron_seqpar.telemetry.attention_bars import STEP, attention_bars, transfer_bars
from megatron_seqpar.telemetry.trace import Bar, RankTrace

_STEP_EVENTS = ("iteration", "micro-batch")


class StepTracer:
    """Traces the chosen steps of a run.

    folder: gets one folder a step. wanted: whether a step, by its number from 1, is traced.
    """

    def __init__(self, folder: Path, wanted: Callable[[int], bool]) -> None:
        self.folder, self.wanted = folder, wanted
        self._backward_steps = 0

    def train_step(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Megatron's `train_step`, traced when wanted."""

        def train_step(*args: Any, **kwargs: Any) -> Any:
            iteration = steps.iteration()
            if not self.wanted(iteration):
                return original(*args, **kwargs)
            return self._traced(iteration, lambda: original(*args, **kwargs))

        return train_step

    def _traced(self, iteration: int, step: Callable[[], Any]) -> Any:
        measurement = measure.current()
        folder = self.folder / f"step-{iteration:06d}"
        if os.environ.get("LOCAL_RANK", "0") == "0":
            trace.clear(folder)  # of an earlier run, which may have had more ranks
        self._backward_steps = 0
        _synchronize()
        traced = measurement.begin("cpu" if cpu_runtime.is_active() else "cuda")
        dist.barrier()
        origin, origin_wall = time.perf_counter_ns(), time.time_ns()
        try:
            with traced.recorder.span("iteration", iteration=iteration):
                result = step()
        finally:
            _synchronize()
            traced.close()
            measurement.end()
        rank = dist.get_rank()
        bars = _step_bars(traced) + _attention(traced)
        found = RankTrace(
            rank, _label(rank), _machine(), origin, origin_wall, tuple(bars), {"step": iteration}
        )
        trace.write(found, trace.rank_path(folder, rank))
        dist.barrier()
        if rank == 0:
            _join(folder, iteration)
        return result

    def forward_step(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Megatron's `forward_step` of one micro-batch."""

        def forward_step(*args: Any, **kwargs: Any) -> Any:
            measurement = measure.current()
            if measurement.traced is None:
                return original(*args, **kwargs)
            number = kwargs.get("current_microbatch")
            measurement.microbatch = number
            facts = {"direction": "forward", "microbatch": number, "chunk": kwargs.get("vp_stage")}
            try:
                with measurement.traced.recorder.span("micro-batch", **facts):
                    return original(*args, **kwargs)
            finally:
                measurement.microbatch = None

        return forward_step

    def backward_step(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Megatron's `backward_step` of one micro-batch, counted in the order they come.

        That is the order of the forward steps unless a stage holds several chunks of the model.
        """

        def backward_step(*args: Any, **kwargs: Any) -> Any:
            measurement = measure.current()
            if measurement.traced is None:
                return original(*args, **kwargs)
            order, self._backward_steps = self._backward_steps, self._backward_steps + 1
            number = order if _one_chunk_a_stage() else None
            # what recomputation runs again belongs to this micro-batch
            measurement.microbatch = number
            facts = {"direction": "backward", "microbatch": number, "order": order}
            try:
                with measurement.traced.recorder.span("micro-batch", **facts):
                    return original(*args, **kwargs)
            finally:
                measurement.microbatch = None

        return backward_step


def _one_chunk_a_stage() -> bool:
    from megatron.core import parallel_state

    return parallel_state.get_virtual_pipeline_model_parallel_world_size() is None


def _step_bars(traced: measure.TracedAttention) -> list[Bar]:
    bars = []
    for event in traced.recorder.events():
        if event.name not in _STEP_EVENTS:
            continue
        facts = {name: value for name, value in event.details.items() if value is not None}
        name = f"iteration {facts.get('iteration')}"
        if "microbatch" in facts:
            name = f"{facts['direction']} micro-batch {facts['microbatch']}"
        elif event.name == "micro-batch":
            name = f"{facts['direction']} no. {facts['order']}"
        bars.append(Bar(STEP, name, event.begin, event.end, {"kind": event.name, **facts}))
    return bars


def _attention(traced: measure.TracedAttention) -> list[Bar]:
    events = [e for e in traced.recorder.events() if e.name not in _STEP_EVENTS]
    bars = attention_bars(events)
    for watched in traced.transports.values():
        bars += transfer_bars(watched.events(), watched.rank, *_names(watched))
    return bars


def _names(watched: WatchedTransport) -> tuple[Callable[[int], int], str]:
    """How group ranks are called in the world, and the group's name."""
    group = getattr(watched.inner, "group", None)
    if group is None:
        return (lambda rank: rank), "group"
    return (lambda rank: int(dist.get_global_rank(group, rank))), str(group.group_desc)


def _label(rank: int) -> str:
    """The rank's place in the parallel layout: "rank 5 (SP 1, TP 1, PP 0, DP 0)"."""
    from megatron.core import parallel_state

    from megatron_seqpar.integration import axis

    places = {
        "SP": axis.current().rank if axis.initialized() else 0,
        "TP": parallel_state.get_tensor_model_parallel_rank(),
        "PP": parallel_state.get_pipeline_model_parallel_rank(),
        "DP": parallel_state.get_data_parallel_rank(),
    }
    return f"rank {rank} ({', '.join(f'{name} {place}' for name, place in places.items())})"


def _machine() -> str:
    """The same for all processes that share a wall clock, network namespaces or not."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.is_file() else socket.gethostname()


def _synchronize() -> None:
    if not cpu_runtime.is_active():
        torch.cuda.synchronize()


def _join(folder: Path, iteration: int) -> None:
    """Join the ranks' files and say where the result is."""
    seen, world = len(list(folder.glob("rank-*"))), dist.get_world_size()
    path = trace.merge(folder)
    text = f"[seqpar] step {iteration} traced: {path}"
    if seen < world:
        text += (
            f" holds {seen} of {world} ranks; copy the other machines' files to {folder} and run "
            f"megatron-seqpar trace {folder}"
        )
    print(text, flush=True)


_installed: StepTracer | None = None


def install(folder: str, wanted: Callable[[int], bool]) -> None:
    """Trace the steps of the coming run that `wanted` names, into `folder`.

    A second call changes nothing: Megatron may parse its arguments twice.
    Raises `SeqParError` when the folder cannot be written to.
    """
    global _installed
    if _installed is not None:
        return
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SeqParError(f"--seqpar-trace {folder}: {error}") from error
    if not os.access(target, os.W_OK):
        raise SeqParError(f"--seqpar-trace {folder}: {platform.node()} cannot write there")
    _installed = StepTracer(target, wanted)
    for place in ("train_step", "forward_step", "backward_step"):
        steps.around(place, getattr(_installed, place))


def uninstall() -> None:
    """Undo `install`."""
    global _installed
    if _installed is not None:
        for place in ("train_step", "forward_step", "backward_step"):
            steps.remove(place, getattr(_installed, place))
        _installed = None
