# SPDX-License-Identifier: Apache-2.0
"""TensorBoard scalars of attention, beside Megatron's own.

Per iteration, of each rank of the SP axis that the writing rank is on: seconds that attention
waited and computed, bytes that it sent. Megatron's writer lives on the last rank of the world; the
others tell it their three numbers in one small all-gather whenever Megatron itself writes scalars.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_seqpar import cpu_runtime
from megatron_seqpar.integration import measure, steps

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


_installed: Scalars | None = None


def install() -> None:
    """Write scalars in the coming run, which has --tensorboard-dir. A second call changes nothing.

    Call it after the report is put around the same steps, which times what is inside of it.
    """
    global _installed
    if _installed is None:
        measure.current().wanted = True
        _installed = Scalars()
        steps.around("train_step", _installed.train_step)


def uninstall() -> None:
    """Undo `install`."""
    global _installed
    if _installed is not None:
        steps.remove("train_step", _installed.train_step)
        _installed = None
