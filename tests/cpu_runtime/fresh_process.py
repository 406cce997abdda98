# SPDX-License-Identifier: Apache-2.0
"""Run a function in a process where nothing is patched yet, for tens of milliseconds.

The CPU runtime cannot be undone, so each check needs a process of its own. They are forked from a
server that has imported torch and the Megatron modules that have hooks, and has patched nothing.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

PRELOAD = [
    "torch",
    "torch.utils.data",
    "torch.distributed",
    "megatron.training.initialize",
    "megatron.training.arguments",
    "megatron.core.models.hybrid.hybrid_layer_specs",
    "megatron.core.models.mamba.mamba_layer_specs",
]


class FreshProcessError(AssertionError):
    """The function raised; the text is its traceback and whatever it printed to stderr."""


def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def _answer(
    connection: Connection, environment: dict[str, str], function: Callable[..., Any], args: Any
) -> None:
    os.environ.update(environment)
    try:
        connection.send((True, function(*args)))
    except BaseException:
        connection.send((False, traceback.format_exc()))


def run_together(
    calls: list[tuple[Callable[..., Any], tuple[Any, ...]]],
    *,
    environments: list[dict[str, str]] | None = None,
    seconds: float = 60.0,
) -> list[Any]:
    """Call each (function, args) in a fresh process of its own, all at once; their results.

    Functions and results must be picklable. Raises FreshProcessError where one raises or takes
    longer than `seconds`.
    """
    context = _context()
    workers = []
    for index, (function, args) in enumerate(calls):
        here, there = context.Pipe()
        environment = environments[index] if environments else {}
        worker = context.Process(target=_answer, args=(there, environment, function, args))
        worker.start()
        there.close()
        workers.append((worker, here))
    results = []
    try:
        for worker, here in workers:
            if not here.poll(seconds):
                raise FreshProcessError(f"no answer within {seconds} s")
            try:
                passed, value = here.recv()
            except EOFError:
                worker.join(5)
                raise FreshProcessError(f"ended with status {worker.exitcode}") from None
            if not passed:
                raise FreshProcessError(value)
            results.append(value)
    finally:
        for worker, _ in workers:
            worker.join(5)
            if worker.is_alive():
                worker.kill()
    return results


def run_fresh(function: Callable[..., Any], *args: Any, **environment: str) -> Any:
    """Call `function(*args)` in a fresh process with these environment variables; its result."""
    return run_together([(function, args)], environments=[environment])[0]
