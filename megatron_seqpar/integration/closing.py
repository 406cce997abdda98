# SPDX-License-Identifier: Apache-2.0
"""The closing summary of a run without a report: a few lines by rank 0 when training has ended.

It costs a run nothing: no synchronisation, no measuring of attention that nobody else asked for, no
line a step. A step's time is that from its start to the next one's, which is right on average
though a GPU works behind; bytes are counted in the first two steps, where the calls of
torch.distributed pass through Python once more, and those of the last counted one are told.

Ranks tell rank 0 through the store (`meeting`), not by a collective, and what goes wrong here ends
in a line that says so: neither can stop a run that still has its last checkpoint to write.
"""

from __future__ import annotations

import contextlib
import time
from array import array
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch.distributed as dist

from megatron_seqpar import cpu_runtime
from megatron_seqpar.integration import (
    device_samples,
    measure,
    meeting,
    run_facts,
    steps,
    utilization,
)
from megatron_seqpar.integration.closing_text import summary
from megatron_seqpar.telemetry.memory import memory_use
from megatron_seqpar.telemetry.traffic import TrafficMeter

COUNTED_STEPS = 2
ATTENTION_STEPS = 16
_ATTENTION = ("attention_compute_seconds", "attention_wait_seconds")


class Closing:
    """What is kept of one call of Megatron's `train` on this rank.

    label: names the call among all ranks.
    """

    def __init__(self, label: str) -> None:
        self.label = label
        self.starts, self.tokens = array("d"), array("q")
        self.bytes_of_a_step: int | None = None
        self._traffic = TrafficMeter()
        self._attention, self._attended = dict.fromkeys(_ATTENTION, 0.0), 0

    def train_step(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Megatron's `train_step`, noted."""

        def train_step(*args: Any, **kwargs: Any) -> Any:
            tokens = run_facts.tokens_per_step()
            self.starts.append(time.perf_counter())
            self.tokens.append(tokens)
            with self._counting_bytes(), self._adding_attention():
                return original(*args, **kwargs)

        return train_step

    @contextlib.contextmanager
    def _counting_bytes(self) -> Iterator[None]:
        """Counts bytes in the first steps, and does nothing in the others."""
        if len(self.starts) > COUNTED_STEPS:
            yield
            return
        self._traffic.reset()
        with self._traffic.running():
            yield
        self.bytes_of_a_step = self._traffic.bytes

    @contextlib.contextmanager
    def _adding_attention(self) -> Iterator[None]:
        """Adds up attention's seconds in the first timed steps alone: reading them has a price."""
        step = len(self.starts) - run_facts.UNTIMED_STEPS
        if not 1 <= step <= ATTENTION_STEPS or not _attention_is_measured():
            yield
            return
        before = measure.current().totals()
        yield
        added = measure.totals_since(before)
        self._attended += 1
        for name in _ATTENTION:
            self._attention[name] += added[name]

    def finish(self) -> None:
        """Tell rank 0; it prints the summary, of the ranks that have told within a while."""
        if not self.starts:
            return
        ranks = meeting.gather(self.label, self._record())
        if ranks is not None:
            print(summary(_report(ranks, self._rates())), flush=True)

    def _rates(self) -> run_facts.Rates:
        seconds = [after - before for before, after in pairwise(self.starts)]
        first = run_facts.UNTIMED_STEPS
        return run_facts.rates(seconds[first:], self.tokens[first:-1])

    def _record(self) -> dict[str, Any]:
        use = memory_use()
        return {
            "rank": dist.get_rank(),
            "memory": use.kind,
            "peak_memory_bytes": use.peak,
            "steps": len(self.starts),
            "seconds_per_step": self._rates().seconds,
            "bytes_of_a_step": self.bytes_of_a_step,
            **{
                name: seconds / self._attended if self._attended else None
                for name, seconds in self._attention.items()
            },
            "telemetry": device_samples.end(),
            **utilization.current().as_record(),
        }


def _attention_is_measured() -> bool:
    """In every step, that is; a trace of single steps on a GPU measures in those alone."""
    return measure.current().wanted or cpu_runtime.is_active()


def _report(ranks: list[dict[str, Any]], rates: run_facts.Rates) -> dict[str, Any]:
    """What `closing_text.summary` shows, with the numbers of a report that are known here.

    rates: of rank 0, whose steps take as long as everybody's.
    """

    def most(name: str) -> Any:
        return max((rank[name] for rank in ranks if rank[name] is not None), default=None)

    sent = [rank["bytes_of_a_step"] for rank in ranks if rank["bytes_of_a_step"] is not None]
    return {
        **run_facts.facts(dist.get_world_size()),
        "summary": {
            "steps": ranks[0]["steps"],
            "timed_steps": rates.steps,
            "timed_how": ", from start to start",
            "seconds_per_step": rates.seconds,
            "tokens_per_second": rates.tokens_per_second,
            **utilization.current().summary(rates, ranks, dist.get_world_size()),
            "attention_wait_seconds_per_step": most("attention_wait_seconds"),
            "attention_compute_seconds_per_step": most("attention_compute_seconds"),
            "peak_memory_bytes": most("peak_memory_bytes"),
            "bytes_sent_per_rank_and_step": sum(sent) / len(sent) if sent else None,
        },
        "ranks": ranks,
    }


class _Summaries:
    """Around `train`: a `Closing` for each call of it."""

    def __init__(self) -> None:
        self._calls = 0

    def train(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Megatron's `train`, with its summary when it ends, also by an orderly exit."""

        def train(*args: Any, **kwargs: Any) -> Any:
            self._calls += 1
            closing = Closing(f"closing {self._calls}")
            utilization.begin(args, kwargs)
            device_samples.begin()
            steps.around("train_step", closing.train_step)
            try:
                result = original(*args, **kwargs)
            except SystemExit as leaving:
                if not leaving.code:  # --exit-interval and the like: all ranks leave together
                    with _harmless():
                        closing.finish()
                raise
            finally:
                steps.remove("train_step", closing.train_step)
                device_samples.end()
            with _harmless():
                closing.finish()
            return result

        return train


@contextlib.contextmanager
def _harmless() -> Iterator[None]:
    """An error of the body is told and goes no further: the run matters more than its summary."""
    try:
        yield
    except Exception as error:
        text = f"[seqpar] no closing summary: {type(error).__name__}: {error}"
        print(f"{text} (--seqpar-no-summary leaves it out)", flush=True)


_installed: _Summaries | None = None


def install() -> None:
    """Summarise the coming training runs of this process. A second call changes nothing."""
    global _installed
    if _installed is None:
        _installed = _Summaries()
        steps.around("train", _installed.train)


def uninstall() -> None:
    """Undo `install`."""
    global _installed
    if _installed is not None:
        steps.remove("train", _installed.train)
        _installed = None
