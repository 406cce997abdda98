# SPDX-License-Identifier: Apache-2.0
"""Ranks that fail: what was measured before is kept, and the first cause is told."""

from __future__ import annotations

import os
import signal

import pytest
import torch
import torch.distributed as dist

from megatron_seqpar.bench.place import Place
from megatron_seqpar.bench.ranks import Emit, on_ranks
from megatron_seqpar.bench.watch import Watch, ran_out_of_memory
from megatron_seqpar.errors import SeqParError


def _runs_out_of_memory(device: torch.device, emit: Emit) -> None:
    watch = Watch(device)
    assert watch.largest(float(dist.get_rank())) == 1.0
    assert watch.tried(lambda: torch.zeros(4))
    assert not watch.tried(lambda: torch.zeros(2**60) if dist.get_rank() == 1 else None)
    if dist.get_rank() == 0:
        emit({"measured": 1})
    watch.agreed(True)
    if dist.get_rank() == 1:
        torch.zeros(2**60)
    dist.barrier()  # rank 0 loses its peer here


def _is_killed(device: torch.device, emit: Emit) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _refuses(device: torch.device, emit: Emit) -> None:
    raise SeqParError("--heads 3: use 4")


def test_rows_before_the_memory_ran_out_are_kept() -> None:
    found = on_ranks(_runs_out_of_memory, Place("cpu", 2, 2))
    assert found.rows == [{"measured": 1}]
    assert found.failure == "oom"
    assert "allocate memory" in found.text


@pytest.mark.slow
def test_a_killed_rank_counts_as_out_of_memory() -> None:
    found = on_ranks(_is_killed, Place("cpu", 1, 1))
    assert (found.failure, found.rows) == ("oom", [])
    assert "takes too much memory" in found.text


@pytest.mark.slow
def test_what_a_rank_refuses_is_said_as_it_is() -> None:
    found = on_ranks(_refuses, Place("cpu", 2, 2))
    assert found.failure == "refused"
    with pytest.raises(SeqParError, match=r"^--heads 3: use 4$"):
        found.checked()


def test_errors_about_memory_are_told_from_others() -> None:
    assert ran_out_of_memory(torch.cuda.OutOfMemoryError("CUDA out of memory"))
    assert ran_out_of_memory(MemoryError())
    assert not ran_out_of_memory(RuntimeError("Connection closed by peer"))
