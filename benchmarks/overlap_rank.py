# SPDX-License-Identifier: Apache-2.0
"""One rank of `overlap.py`: runs on a pretended host of `scripts/two_hosts.sh`, under torchrun.

In one run of one set of processes:

1. without a limit on the link, the seconds that a step (forward and backward of one attention call)
   spends in its tiles;
2. the link is limited until the transfers of a step, alone, take as long: they are timed by running
   the very schedule with a kernel that computes nothing;
3. messages of some sizes are timed for the simulator;
4. rounds: tiles of many sizes for the simulator, a step with overlap and one without, in an order
   that changes from round to round, so that a machine whose speed drifts does not decide;
5. one step of each kind is traced.

Rank 0 writes what was found as JSON, every rank its traces.
"""

from __future__ import annotations

import json
import os
import re
import socket
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
import typer

from megatron_seqpar.attention import Schedule, build_schedule, kernels
from megatron_seqpar.attention.execute import Execution
from megatron_seqpar.attention.kernels import Kernel, TileCall
from megatron_seqpar.attention.layouts import TokenLayout
from megatron_seqpar.attention.measure import measure_links, measure_tiles, shapes_up_to
from megatron_seqpar.attention.recorder import Labelled, TimedRecorder
from megatron_seqpar.attention.transport import Transport, transport_of
from megatron_seqpar.attention.watch import WatchedTransport
from megatron_seqpar.simulate.calibrate import TileRow
from megatron_seqpar.telemetry import trace
from megatron_seqpar.telemetry.attention_bars import attention_bars, transfer_bars

PASSES = ("forward", "backward")
BURST = 32 * 1024  # bytes that the limiter lets through at once: three packets of the link
LATENCY = "100ms"  # longest queue of the limiter
RATE_ROUNDS = 5
CLOSE_ENOUGH = 0.03


class NoKernel:
    """Computes nothing: what is left of a step is its transfers."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: TileCall
    ) -> tuple[torch.Tensor, torch.Tensor]:
        b, s, h, _ = q.shape
        return q.new_zeros((b, s, h, v.shape[-1])), q.new_zeros((b, h, s))

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        call: TileCall,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)


@dataclass
class Work:
    """This rank's tensors and how to run a step on them."""

    plan: Schedule
    transport: Transport
    kernel: Kernel
    tensors: dict[str, torch.Tensor]

    @classmethod
    def of(cls, plan: Schedule, transport: Transport, kernel: Kernel) -> Work:
        problem = plan.problem
        tokens = problem.layout.lengths[transport.rank]
        generator = torch.Generator().manual_seed(transport.rank)
        heads = {"q": problem.query_heads, "k": problem.kv_heads, "v": problem.kv_heads}
        tensors = {
            name: torch.randn(1, tokens, count, problem.head_dim, generator=generator)
            for name, count in {**heads, "dout": problem.query_heads}.items()
        }
        return cls(plan, transport, kernel, tensors)

    def step(
        self,
        overlap: bool,
        *,
        kernel: Kernel | None = None,
        recorder: TimedRecorder | None = None,
        transport: Transport | None = None,
    ) -> dict[str, Any]:
        """Run both passes; seconds of each until the slowest rank is done, and this rank's sums."""
        recorder = recorder or TimedRecorder()
        run = Execution(
            self.plan,
            transport or self.transport,
            kernel or self.kernel,
            self.plan.problem.head_dim**-0.5,
            overlap=overlap,
            recorder=Labelled(recorder, call=1),
        )
        q, k, v, dout = (self.tensors[name] for name in ("q", "k", "v", "dout"))
        seconds = {}
        dist.barrier()
        start = time.perf_counter()
        out, lse = run.forward(q, k, v)
        seconds["forward"] = _slowest(time.perf_counter() - start)
        start = time.perf_counter()
        run.backward(dout, q, k, v, out, lse)
        seconds["backward"] = _slowest(time.perf_counter() - start)
        sums = {"tile": 0.0, "wait": 0.0, "post": 0.0, "merge": 0.0}
        for event in recorder.events():
            sums[event.name] += event.seconds
        return {**seconds, "step": sum(seconds.values()), "sums": sums}


def _slowest(seconds: float) -> float:
    """The largest over the ranks; also a barrier."""
    value = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return value.item()


def limit_link(rate: float) -> None:
    """Limit this host's end of the link to `rate` bytes/s; the host's first rank does it."""
    if os.environ["LOCAL_RANK"] == "0":
        limiter = f"rate {round(rate * 8)}bit burst {BURST} latency {LATENCY}"
        link = os.environ["SEQPAR_LINK"]
        command = ["tc", "qdisc", "replace", "dev", link, "root", "tbf", *limiter.split()]
        subprocess.run(command, check=True)
    dist.barrier()


def bytes_between_hosts(plan: Schedule, ranks_per_host: int) -> int:
    """The most bytes that a host sends to the other one in a step, both passes."""
    sent = [0, 0]
    for each in (plan, plan.backward()):
        for rank in range(plan.size):
            for step in each.steps(rank):
                for move in step.sends:
                    if move.dst // ranks_per_host != rank // ranks_per_host:
                        size = each.problem.transfer_bytes(move, 4)
                        sent[rank // ranks_per_host] += size
    return max(sent)


def find_rate(work: Work, size: int, compute: float) -> tuple[float, float]:
    """(rate in bytes/s, seconds of the transfers alone) with the latter next to `compute`."""
    rate, found = size / compute, 0.0
    for _ in range(RATE_ROUNDS):
        limit_link(rate)
        work.step(False, kernel=NoKernel())
        alone = [work.step(False, kernel=NoKernel())["sums"]["wait"] for _ in range(2)]
        found = _slowest(min(alone))
        if abs(found / compute - 1) < CLOSE_ENOUGH:
            break
        rate *= found / compute
    return rate, found


def write_trace(work: Work, overlap: bool, folder: Path) -> dict[str, float]:
    """Run one step with everything watched; this rank's file; the times of the step."""
    recorder = TimedRecorder()
    watched = WatchedTransport(work.transport, recorder)
    dist.barrier()
    origin, wall = time.perf_counter_ns(), time.time_ns()
    times = work.step(overlap, recorder=recorder, transport=watched)
    watched.close()
    rank = dist.get_rank()
    bars = attention_bars(recorder.events())
    bars += transfer_bars(watched.events(), rank, lambda group_rank: group_rank, "world")
    label = f"rank {rank} on host {os.environ['PET_NODE_RANK']}"
    found = trace.RankTrace(rank, label, socket.gethostname(), origin, wall, tuple(bars))
    trace.write(found, trace.rank_path(folder, rank))
    dist.barrier()
    if rank == 0:
        trace.merge(folder)
    return times


def case_name(schedule: str, mask: str, ranks_per_host: int) -> str:
    """A name for files."""
    return re.sub(r"[^a-z0-9]+", "-", f"{schedule} {mask} {ranks_per_host}")


def _median_row(rows: Sequence[TileRow]) -> TileRow:
    return replace(rows[0], seconds=statistics.median(row.seconds for row in rows))


def plan_of(case: dict[str, Any]) -> Schedule:
    """The schedule of a case, described as in the result."""
    schedule, size, tokens = case["schedule"], case["ranks"], case["tokens"]
    if schedule == "zigzag":
        layout = TokenLayout.zigzag(size, tokens)
    else:
        layout = TokenLayout.contiguous(size, seq_length=tokens)
    return build_schedule(
        schedule,
        layout=layout,
        mask=case["mask"],
        query_heads=case["heads"],
        kv_heads=case["kv_heads"],
        head_dim=case["head_dim"],
        node_size=case["ranks_per_host"],
    )


def main(
    output: Annotated[Path, typer.Option(help="Rank 0 writes its JSON here.")],
    schedule: Annotated[str, typer.Option()] = "balanced",
    mask: Annotated[str, typer.Option()] = "causal",
    tokens: Annotated[int, typer.Option()] = 8192,
    heads: Annotated[int, typer.Option()] = 8,
    kv_heads: Annotated[int, typer.Option()] = 2,
    dim: Annotated[int, typer.Option()] = 64,
    rounds: Annotated[int, typer.Option()] = 5,
    repeats: Annotated[int, typer.Option(help="Of each measured message.")] = 3,
) -> None:
    """Measure; see the text at the top of this file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    transport = transport_of(None)
    ranks_per_host = int(os.environ["LOCAL_WORLD_SIZE"])
    sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": dim}
    case = {
        "schedule": schedule,
        "mask": mask,
        "ranks": transport.size,
        "ranks_per_host": ranks_per_host,
        "tokens": tokens,
        **sizes,
    }
    plan = plan_of(case)
    _, kernel = kernels.select("cpu", device=torch.device("cpu"), dtype=torch.float32, head_dim=dim)
    work = Work.of(plan, transport, kernel)
    work.step(True)
    unlimited = [work.step(False) for _ in range(3)]
    compute = statistics.median(_slowest(row["sums"]["tile"]) for row in unlimited)
    size = bytes_between_hosts(plan, ranks_per_host)
    rate, alone = find_rate(work, size, compute)

    longest = max(max(t.q.size, t.kv.size) for s in plan.steps(0) for t in s.tiles)
    links = measure_links(
        sizes=(1 << 18, 1 << 20, 1 << 22), node_size=ranks_per_host, repeats=repeats
    )

    measured, tiles = [], []
    for number in range(rounds):
        dist.barrier()  # all ranks at once, as in a step
        tiles.append(
            measure_tiles(
                shapes_up_to(longest), device="cpu", dtype=torch.float32, repeats=1, **sizes
            )
        )
        row: dict[str, Any] = {}
        for overlap in (True, False) if number % 2 else (False, True):
            found = work.step(overlap)
            found["sums"] = {name: _slowest(value) for name, value in found["sums"].items()}
            row["overlap" if overlap else "no_overlap"] = found
        measured.append(row)
        if transport.rank == 0:
            shown = [row[name]["step"] for name in ("no_overlap", "overlap")]
            print(
                f"{plan.name}, {mask}, {transport.size} ranks, round {number + 1}/{rounds}: "
                f"no overlap {shown[0]:.3f} s, overlap {shown[1]:.3f} s, "
                f"ratio {shown[0] / shown[1]:.3f}",
                flush=True,
            )
    traced = {
        name: write_trace(work, overlap, output.parent / f"{output.stem}-{name}")
        for name, overlap in (("overlap", True), ("no_overlap", False))
    }
    if transport.rank == 0:
        result = {
            **case,
            "compute_seconds": compute,
            "transfer_seconds_alone": alone,
            "rate_bytes_per_second": rate,
            "bytes_between_hosts_per_step": size,
            "rounds": measured,
            "traced": traced,
            "tile_rows": [asdict(_median_row(same)) for same in zip(*tiles, strict=True)],
            "link_rows": [asdict(row) for row in links],
        }
        output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
