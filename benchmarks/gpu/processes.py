# SPDX-License-Identifier: Apache-2.0
"""Real process groups: two processes that share the GPU, over NCCL and over gloo.

NCCL refuses two ranks on one GPU of one host. Told that they are on different hosts (NCCL_HOSTID),
it connects them by sockets over the loopback device, slowly but with the streams, works and groups
of any other run, which is what is checked here. Where it still refuses, that is said and is no
failure.
"""

from __future__ import annotations

import math
import multiprocessing as mp
import os
import random
import tempfile
import time
import traceback
from collections.abc import Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.gpu.settings import Outcome, Settings
from benchmarks.gpu.stress import CYCLES_PER_SECOND, NAN
from benchmarks.gpu.truth import (
    LIMIT,
    Results,
    Shape,
    attention,
    error_ratios,
    inputs,
    largest_difference,
    seen,
)
from megatron_seqpar.attention import Causal, ProcessGroupTransport, dist_flash_attention
from megatron_seqpar.attention.transport import Message, Pending

RANKS = 2
EXACT = 1e-8


class ShakenTransport(ProcessGroupTransport):
    """Sleeps at random before every post, and fills what is received in with NaN."""

    random = random.Random(0)

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        for m in receives:
            m.tensor.fill_(NAN)
        if (sends or receives) and (sends or receives)[0].tensor.is_cuda:
            torch.cuda._sleep(int(self.random.uniform(0, 1e-3) * CYCLES_PER_SECOND))
        return super().exchange(sends, receives)


def _attention(
    group: dist.ProcessGroup, device: torch.device, tokens: int, dtype: torch.dtype, schedule: str
) -> float:
    """The error of this rank's part: absolute in fp64, else as a multiple of plain attention's."""
    shape = Shape((tokens, tokens), 4, 2, 32, 32)
    data = inputs(shape, dtype, device)
    transport = ShakenTransport(group)
    chunk = tokens // RANKS
    at = slice(chunk * transport.rank, chunk * (transport.rank + 1))
    q, k, v = leaves = [t[:, at].detach().requires_grad_() for t in data[:3]]
    result = dist_flash_attention(
        q, k, v, group=transport, schedule=schedule, return_lse=True,
        kernel="reference" if dtype == torch.float64 else "auto",
    )  # fmt: skip
    assert isinstance(result, tuple)
    out, lse = result
    grads = torch.autograd.grad(out, leaves, data.dout[:, at])
    got = Results(out.detach(), lse, *grads)
    pairs = seen(Causal().regions(tokens), shape.tokens, device)

    def part(whole: Results) -> Results:
        return Results(*(t[:, :, at] if name == "lse" else t[:, at]
                         for name, t in zip(Results._fields, whole, strict=True)))  # fmt: skip

    truth = part(attention(data, pairs, torch.float64, shape.dim**-0.5))
    if dtype == torch.float64:
        return largest_difference(got, truth)
    plain = part(attention(data, pairs, dtype, shape.dim**-0.5))
    return max(error_ratios(got, plain, truth).values())


def _rank(
    rank: int, backend: str, device_type: str, tokens: int, runs: int, store: str, pipe: Connection
) -> None:
    """One process: ("refused", why) when the group cannot be made, ("ran", worst errors), ..."""
    try:
        device = torch.device(device_type)
        if device_type == "cuda":
            torch.cuda.set_device(0)
        torch.set_num_threads(1)
        try:
            dist.init_process_group(
                backend, init_method=f"file://{store}", rank=rank, world_size=RANKS,
                timeout=timedelta(seconds=60),
            )  # fmt: skip
            assert dist.group.WORLD is not None
            ProcessGroupTransport(dist.group.WORLD).prepare(device)
            dist.barrier()
        except Exception as reason:  # whatever a backend raises when it cannot be had
            pipe.send(("refused", str(reason).splitlines()[0]))
            os._exit(0)  # a half-made communicator may not end by itself
        worst = {"fp64": 0.0, "bf16": 0.0}
        for run in range(runs):
            schedule = ("balanced", "ring")[run % 2]
            for name, dtype in (("fp64", torch.float64), ("bf16", torch.bfloat16)):
                error = _attention(dist.group.WORLD, device, tokens, dtype, schedule)
                worst[name] = max(worst[name], error)
        pipe.send(("ran", worst))
        dist.destroy_process_group()
    except BaseException:
        pipe.send(("failed", traceback.format_exc()))
        os._exit(1)


def shared_gpu(rank: int) -> dict[str, str]:
    """Variables under which NCCL takes the ranks on one GPU for ranks on different hosts."""
    return {
        "NCCL_HOSTID": f"rank{rank}",
        "NCCL_SOCKET_IFNAME": "lo",
        # sockets only: what else could join two hosts would find that they are one
        "NCCL_IB_DISABLE": "1",
        "NCCL_MNNVL_ENABLE": "0",
        "NCCL_NVLS_ENABLE": "0",
    }


def over(backend: str, settings: Settings, seconds: float) -> tuple[str, Any]:
    """("ran", worst errors by dtype), ("refused", why) or ("failed", traceback)."""
    context = mp.get_context("spawn")
    tokens = settings.pick(full=1024, quick=1024, tiny=64)
    runs = settings.pick(full=10, quick=4, tiny=2)
    processes, pipes = [], []
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        for rank in range(RANKS):
            ours, theirs = context.Pipe()
            arguments = (rank, backend, settings.device.type, tokens, runs, store, theirs)
            added = shared_gpu(rank) if backend == "nccl" else {}
            before = {name: os.environ.get(name) for name in added}
            os.environ.update(added)  # inherited by the process started now
            process = context.Process(target=_rank, args=arguments, daemon=True)
            process.start()
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
            processes.append(process)
            pipes.append(ours)
            theirs.close()
        deadline = time.monotonic() + seconds
        answers = [_answer(pipe, deadline - time.monotonic()) for pipe in pipes]
        for process in processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
    for kind in ("failed", "refused"):
        for answer in answers:
            if answer[0] == kind:
                return answer
    worst = {name: max(answer[1][name] for answer in answers) for name in answers[0][1]}
    return "ran", worst


def _answer(pipe: Connection, seconds: float) -> tuple[str, Any]:
    try:
        if pipe.poll(max(0.0, seconds)):
            answer: tuple[str, Any] = pipe.recv()
            return answer
        return "failed", "said nothing in time"
    except EOFError:
        return "failed", "ended without a word"


def run(settings: Settings) -> Outcome:
    """Both backends (on the CPU gloo alone)."""
    outcome = Outcome()
    said = []
    for backend in ("nccl", "gloo") if settings.on_gpu else ("gloo",):
        kind, found = over(backend, settings, min(90.0, settings.seconds))
        outcome.data[backend] = {kind: found}
        if kind == "refused":
            outcome.left_out.append(f"{backend}: {found}")
            said.append(f"{backend} not to be had")
        elif kind == "failed":
            last = str(found).strip().splitlines()[-1]
            outcome.failures.append(f"{backend}: {last}")
            said.append(f"{backend} failed")
        else:
            limits = {"fp64": EXACT, "bf16": LIMIT}
            for name, value in found.items():
                if not (math.isfinite(value) and value <= limits[name]):
                    outcome.failures.append(f"{backend}, {name}: {value:.3g} over {limits[name]:g}")
            said.append(f"{backend} fp64 to {found['fp64']:.1e}, bf16 {found['bf16']:.2f} x")
    outcome.says = f"{RANKS} processes, one device: {'; '.join(said)}"
    return outcome
