# SPDX-License-Identifier: Apache-2.0
"""What splitting costs by itself: the tiles and merges of all ranks against one call of the kernel.

The real executor runs for every rank, one rank at a time on one stream, so no two kernels share the
device; its recorder times every tile and merge by CUDA events, and copies between ranks, which
stand for the network, are timed apart. The sum over all ranks of a perfect split is the time of the
one call; what is more is the price of smaller tiles, of merging and of gradients summed in fp32.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, ClassVar

import torch

from benchmarks.gpu.environment import found_kernels
from benchmarks.gpu.settings import Outcome, Settings
from benchmarks.gpu.stress import CYCLES_PER_SECOND
from benchmarks.gpu.timing import clocks, time_calls
from benchmarks.gpu.truth import Inputs, Shape, inputs
from megatron_seqpar.attention import ThreadTransport, dist_flash_attention
from megatron_seqpar.attention.kernels import TileCall, select
from megatron_seqpar.attention.recorder import TimedRecorder, clock_of
from megatron_seqpar.attention.transport.rendezvous import End
from megatron_seqpar.errors import ScheduleError

GOAL = 1.05
CPU = torch.device("cpu")


class OneAtATime(ThreadTransport):
    """Ranks that compute one at a time, on one stream.

    A rank has its turn from the start of its work, and gives it up only while it waits for another
    rank to post. Copies are made on that same stream and recorded as "copy".
    """

    turn: ClassVar[threading.Lock]
    recorder: ClassVar[TimedRecorder]

    def copy(self, send: End, receive: End, stream: torch.cuda.Stream | None) -> None:
        payload = send.kind != "length"  # those are how the ranks begin and end together
        with self.recorder.span("copy") if payload else nullcontext():
            receive.tensor.copy_(send.tensor)

    def transfer_stream(self, receiver: int, device: torch.device) -> torch.cuda.Stream:
        return torch.cuda.current_stream(device)

    def settle(self, end: End) -> None:
        self.turn.release()
        try:
            self.rendezvous.wait(end)
        finally:
            self.turn.acquire()


def one_call(data: Inputs, kernel: str, seconds: float) -> dict[str, float]:
    """Milliseconds of the kernel alone on the whole sequence, by direction."""
    q, k, v, dout = data
    dim = q.shape[-1]
    _, chosen = select(kernel, device=q.device, dtype=q.dtype, head_dim=dim)
    call = TileCall(dim**-0.5, high=0)
    out, lse = chosen.forward(q, k, v, call)
    passes: dict[str, Callable[[], Any]] = {
        "forward": lambda: chosen.forward(q, k, v, call),
        "backward": lambda: chosen.backward(dout, q, k, v, out, lse, call),
    }
    return {
        direction: time_calls(run, q.device, seconds=seconds, warm_up=1, least=1, most=10).median
        for direction, run in passes.items()
    }


def compare(
    shape: Shape, size: int, schedule: str, kernel: str, settings: Settings
) -> dict[str, Any]:
    """Both in turn, several rounds; ratios are taken in a round and their medians reported."""
    data = inputs(shape, settings.half, settings.device)
    clock = clock_of(settings.device.type)
    group: type[OneAtATime] = type("OneAtATime", (OneAtATime,), {"turn": threading.Lock()})
    tokens = shape.tokens[0]
    chunk = tokens // size
    rounds: list[dict[str, Any]] = []

    def both_passes(transport: OneAtATime) -> None:
        at = slice(chunk * transport.rank, chunk * (transport.rank + 1))
        with transport.turn:
            q, k, v = leaves = [t[:, at].detach().requires_grad_() for t in data[:3]]
            out = dist_flash_attention(
                q, k, v, group=transport, schedule=schedule, kernel=kernel, seq_length=tokens,
                recorder=transport.recorder,
            )  # fmt: skip
            assert isinstance(out, torch.Tensor)
            torch.autograd.grad(out, leaves, data.dout[:, at])

    def work(transport: OneAtATime) -> None:
        # the same threads in every round: cuDNN keeps its plans by thread
        ahead = 0.0
        for number in range(1 + settings.pick(full=4, quick=3, tiny=1)):
            if transport.rank == 0:
                whole = one_call(data, kernel, settings.pick(full=0.2, quick=0.1, tiny=0.01))
                recorder = group.recorder = TimedRecorder(clock)
                if settings.on_gpu:  # the host gets ahead, so gaps between launches do not count
                    torch.cuda._sleep(int(ahead * CYCLES_PER_SECOND))
                start, begin = time.perf_counter(), clock.mark()
            transport.gather_lengths(0, CPU)  # all begin together
            both_passes(transport)
            transport.gather_lengths(0, CPU)
            if transport.rank == 0:
                recorder.add("all", begin, clock.mark())
                ahead = min(time.perf_counter() - start, 1.0)
                if settings.on_gpu:
                    torch.cuda.synchronize(settings.device)
                if number:  # the first loads kernels and fills the allocator
                    rounds.append({"one_call": whole, "split": _sums(recorder)})

    group.run(size, work, timeout=120.0)

    def ratio(*directions: str) -> float:
        return statistics.median(
            sum(r["split"][d].get(name, 0.0) for d in directions for name in ("tile", "merge"))
            / sum(r["one_call"][d] for d in directions)
            for r in rounds
        )

    everything = statistics.median(
        (r["split"]["both"]["all"] - r["split"]["both"].get("copy", 0.0))
        / sum(r["one_call"].values())
        for r in rounds
    )
    return {
        "schedule": schedule, "kernel": kernel, "ranks": size, **shape._asdict(),
        "ratio": ratio("forward", "backward"), "ratio_forward": ratio("forward"),
        "ratio_backward": ratio("backward"), "ratio_of_everything_but_copies": everything,
        "rounds": rounds,
    }  # fmt: skip


def _sums(recorder: TimedRecorder) -> dict[str, dict[str, float]]:
    """Milliseconds by direction and by what was done, of all ranks together."""
    sums: dict[str, dict[str, float]] = {"forward": {}, "backward": {}, "both": {}}
    for event in recorder.events():
        times = sums[event.details.get("direction", "both")]
        times[event.name] = times.get(event.name, 0.0) + event.seconds * 1e3
    return sums


def _fastest(shape: Shape, settings: Settings) -> tuple[str, dict[str, dict[str, float]]]:
    """The kernel with the shortest forward and backward pass, and the times of all found here."""
    data = inputs(shape, settings.half, settings.device)
    times = {name: one_call(data, name, 0.05) for name in found_kernels(settings.device)}
    return min(times, key=lambda name: sum(times[name].values())), times


def run(settings: Settings) -> Outcome:
    """The balanced schedule on eight ranks at several lengths, and other schedules at one."""
    k = 1024
    lengths = settings.pick(full=[32 * k, 64 * k, 128 * k], quick=[32 * k], tiny=[256])
    heads, kv_heads, dim = settings.pick(full=(32, 8, 128), quick=(32, 8, 128), tiny=(4, 2, 16))
    size = settings.pick(full=8, quick=8, tiny=4)
    shapes = [Shape((n, n), heads, kv_heads, dim, dim) for n in lengths]
    best, times = _fastest(shapes[0], settings)
    outcome = Outcome(data={"one_call_ms": times, "clocks_before": clocks(), "rows": []})
    todo = [(shape, "balanced", best) for shape in shapes]
    todo += [(shapes[0], name, best) for name in ("zigzag", "ring", "allgather", "ulysses")]
    todo += [(shapes[0], "balanced", name) for name in times if name != best]
    for shape, schedule, kernel in todo:
        if settings.time_is_up:
            outcome.left_out.append(f"{shape.tokens[0]} tokens, {schedule}, {kernel}: no time")
            continue
        try:
            row = compare(shape, size, schedule, kernel, settings)
        except (ScheduleError, torch.OutOfMemoryError) as reason:
            outcome.left_out.append(f"{shape.tokens[0]} tokens, {schedule}, {kernel}: {reason}")
            continue
        outcome.data["rows"].append(row)
    outcome.data["clocks_after"] = clocks()
    main = [row for row in outcome.data["rows"] if (row["schedule"], row["kernel"]) == todo[0][1:]]
    for row in main if settings.on_gpu else ():  # on a CPU times of this size say nothing
        if row["ratio"] > GOAL:
            about = f"balanced, {size} ranks, {row['tokens'][0]} tokens"
            outcome.failures.append(f"{about}: {row['ratio']:.3f} x one call, over {GOAL}")
    shown = ", ".join(f"{row['tokens'][0]:,} tokens {row['ratio']:.3f}" for row in main)
    outcome.says = f"balanced, {size} ranks, {best}: tiles and merges over one call: {shown}"
    return outcome
