# SPDX-License-Identifier: Apache-2.0
"""TensorBoard scalars of speed and of attention, beside Megatron's own.

Speed: tokens a second, MFU and causal MFU of all ranks, by the clock of the rank that writes (the
last of the world, where Megatron's writer lives); and the last sample of that rank's GPU.

Attention, where it is ours: per iteration, of each rank of the SP axis that the writing rank is on,
seconds that attention waited and computed, bytes that it sent. The others tell their three numbers
in one small all-gather whenever Megatron itself writes scalars.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from megatron_seqpar import cpu_runtime
from megatron_seqpar.integration import device_samples, measure, steps, utilization

PREFIX = "seqpar"
RANKS_SHOWN = 16


def scalars(rows: list[list[float]], names: list[str]) -> dict[str, float]:
    """Tag -> value: the mean and the largest over the ranks, and each rank where they are few.

    rows: by rank, the values of `names`.
    """
    found: dict[str, float] = {}
    for column, name in enumerate(names):
        values = [row[column] for row in rows]
        tag = f"{PREFIX}/{name}"
        found[f"{tag}/mean"] = sum(values) / len(values)
        found[f"{tag}/max"] = max(values)
        if len(values) <= RANKS_SHOWN:
            found |= {f"{tag}/rank{rank}": value for rank, value in enumerate(values)}
    return found


class Speed:
    """Writes, before a step, the speed of the steps since Megatron last wrote scalars.

    Time counts from start to start of steps, so that nothing need be synchronised; what lies
    between two steps, such as an evaluation, is in it.
    """

    def __init__(self) -> None:
        self._since: float | None = None
        self._tokens = 0

    def train(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Megatron's `train`; before it, what MFU needs is known."""

        def train(*args: Any, **kwargs: Any) -> Any:
            utilization.begin(args, kwargs)
            device_samples.begin()
            self._since = None
            try:
                return original(*args, **kwargs)
            finally:
                device_samples.end()

        return train

    def train_step(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Megatron's `train_step`."""

        def train_step(*args: Any, **kwargs: Any) -> Any:
            self._before(steps.iteration() - 1)
            return original(*args, **kwargs)

        return train_step

    def _before(self, finished: int) -> None:
        """finished: the number of the step before."""
        from megatron.training import get_args
        from megatron.training.global_vars import get_tensorboard_writer

        from megatron_seqpar.integration import run_facts

        writer, now = get_tensorboard_writer(), time.perf_counter()
        if self._since is None:
            self._since = now
        elif finished % get_args().tensorboard_log_interval == 0:
            speed = self._tokens / (now - self._since)
            self._since, self._tokens = now, 0
            if writer is not None:
                for tag, value in speed_scalars(speed, torch.distributed.get_world_size()).items():
                    writer.add_scalar(tag, value, finished)
        self._tokens += run_facts.tokens_per_step()


def speed_scalars(tokens_per_second: float, world: int) -> dict[str, float]:
    """Tag -> value, of what is known."""
    mfu, causal = utilization.current().of(tokens_per_second, world)
    found = {"tokens_per_second": tokens_per_second or None, "mfu": mfu, "causal_mfu": causal}
    found |= {f"gpu/{name}": value for name, value in device_samples.latest().items()}
    return {f"{PREFIX}/{name}": value for name, value in found.items() if value is not None}


class Scalars:
    """Writes after each step that Megatron writes scalars of."""

    def __init__(self) -> None:
        self._before = measure.current().totals()
        self._steps = 0

    def train_step(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Megatron's `train_step`, with the scalars of the step written after it."""

        def train_step(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            self._steps += 1
            self._after(steps.iteration())
            return result

        return train_step

    def _after(self, iteration: int) -> None:
        from megatron.core import parallel_state
        from megatron.training import get_args
        from megatron.training.global_vars import get_tensorboard_writer

        if iteration % get_args().tensorboard_log_interval:
            return
        added = measure.totals_since(self._before)
        self._before = measure.current().totals()
        names = list(added)
        device = "cpu" if cpu_runtime.is_active() else "cuda"
        mine = torch.tensor(
            [added[name] / self._steps for name in names], dtype=torch.float64, device=device
        )
        self._steps = 0
        # the stock group, not attention's: this is a collective among other collectives
        group = parallel_state.get_context_parallel_group()
        every = [torch.empty_like(mine) for _ in range(group.size())]
        torch.distributed.all_gather(every, mine, group=group)
        writer = get_tensorboard_writer()
        if writer is not None:
            rows = [row.tolist() for row in every]
            for tag, value in scalars(rows, names).items():
                writer.add_scalar(tag, value, iteration)


_installed: list[tuple[str, steps.Wrap]] = []


def install(*, attention: bool) -> None:
    """Write scalars in the coming run, which has --tensorboard-dir. A second call changes nothing.

    attention: it is ours, and has scalars too.
    Call it after the report is put around the same steps, which times what is inside of it.
    """
    if _installed:
        return
    speed = Speed()
    _installed.extend([("train", speed.train), ("train_step", speed.train_step)])
    if attention:
        measure.current().wanted = True
        _installed.append(("train_step", Scalars().train_step))
    for place, wrap in _installed:
        steps.around(place, wrap)


def uninstall() -> None:
    """Undo `install`."""
    for place, wrap in _installed:
        steps.remove(place, wrap)
    _installed.clear()
