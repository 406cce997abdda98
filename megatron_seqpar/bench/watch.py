# SPDX-License-Identifier: Apache-2.0
"""Seconds of work over ranks: from all being ready to the slowest being done."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

LEAST_SECONDS = 0.05
"""Shorter work is repeated until a measurement takes about as long."""
MOST_CALLS = 200

Work = Callable[[], object]


def ran_out_of_memory(failure: BaseException | str) -> bool:
    """Whether an error of torch's, or its text, says that memory is used up."""
    if isinstance(failure, torch.cuda.OutOfMemoryError | MemoryError):
        return True
    text = str(failure).lower()
    words = ("out of memory", "can't allocate memory", "cannot allocate memory", "bad_alloc")
    return any(word in text for word in words)


class Watch:
    """Times work on every rank of the default group; every rank makes the same calls."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def seconds(self, work: Work, calls: int = 1) -> float:
        """Seconds of one of `calls` calls one after the other, of the slowest rank."""
        self._meet()
        start = time.perf_counter()
        for _ in range(calls):
            work()
        self._finish()
        return self._most(time.perf_counter() - start) / calls

    def seconds_alone(self, work: Work, calls: int = 1) -> float:
        """Seconds of a call on rank 0 while the others rest."""
        self._meet()
        start = time.perf_counter()
        if dist.get_rank() == 0:
            for _ in range(calls):
                work()
            self._finish()
        return self._of_first(time.perf_counter() - start) / calls

    def calls_of(self, seconds: float) -> int:
        """How often to repeat work that takes `seconds`; the same on all ranks as that is."""
        return max(1, min(MOST_CALLS, math.ceil(LEAST_SECONDS / max(seconds, 1e-9))))

    def agreed(self, good: bool) -> bool:
        """Whether it is good on every rank."""
        return self._most(0.0 if good else 1.0) == 0.0

    def tried(self, work: Work) -> bool:
        """Run work that sends nothing; False where memory does not suffice on some rank.

        Any other error passes on.
        """
        good = True
        try:
            work()
            self._finish()
        except (RuntimeError, MemoryError) as failure:
            if not ran_out_of_memory(failure):
                raise
            good = False
        return self.agreed(good)

    def largest(self, value: float) -> float:
        """The largest of all ranks' numbers."""
        return self._most(value)

    def _finish(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _meet(self) -> None:
        self._finish()
        self._most(0.0)

    def _most(self, value: float) -> float:
        number = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        return float(number.item())

    def _of_first(self, value: float) -> float:
        number = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.broadcast(number, 0)
        return float(number.item())
