# SPDX-License-Identifier: Apache-2.0
"""What overlapping transfers with computation gives, where transfers take as long as computation.

    sudo .venv/bin/python benchmarks/overlap.py --output benchmarks/results/overlap.json

Two pretended hosts, one core each, on a link that is slowed down until the transfers of a step take
as long as its tiles (`scripts/two_hosts.sh`; Linux, root). In one run, one after the other and in
changing order: a step with overlap and one that waits for its transfers before it computes. A step
is forward and backward of one attention call. `overlap_rank.py` says what is measured and
how; here the runs are started, compared with the simulator, drawn, and a training step of Megatron
across the same link is traced.

How much can be had depends on the schedule, computing C seconds and moving for X = C:

    2 ranks   one step fetches, under the local half of a causal mask's tiles, and results go home
              when nothing is left to compute: at best 1.33; more where more tiles are local
    more      every step but the last both computes and moves

`bound` is the ratio of sums over the schedule's steps, C_t + X_t by max(C_t, X_t).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
import overlap_plot
from overlap_rank import PASSES, case_name, plan_of

from megatron_seqpar.attention import Schedule
from megatron_seqpar.bench import result as result_file
from megatron_seqpar.simulate import Cluster, load_cluster, predict
from megatron_seqpar.simulate.calibrate import LinkRow, TileRow, calibrated
from megatron_seqpar.simulate.cluster import Basis, Figure
from megatron_seqpar.telemetry import trace

ROOT = Path(__file__).resolve().parents[1]
TWO_HOSTS = ROOT / "scripts" / "two_hosts.sh"
MIB = 2**20
WAYS = ("no_overlap", "overlap")
FAR_OFF = 0.1
CASES = (
    "balanced:1",
    "solver:1:window:2048",
    "solver:1:documents:1152,2240,2432,5312,6784,8192",
    "balanced:2",
    "zigzag:2",
)
MEETING = "--nnodes 2 --node-rank {node} --master-addr {address} --master-port {port}"


def on_two_hosts(command: Sequence[str], rate: float | None = None) -> None:
    """Run a command on both hosts and show what it prints; SystemExit when it fails."""
    limit = [] if rate is None else ["--rate", f"{round(rate * 8)}bit"]
    running = subprocess.Popen(
        ["bash", str(TWO_HOSTS), *limit, *command],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=ROOT,
    )
    try:
        status = running.wait()
    except BaseException:
        running.terminate()  # and not killed: it has two hosts to take down
        running.wait()
        raise
    if status != 0:
        raise SystemExit(status)


def measure(
    schedule: str, ranks_per_host: int, mask: str, folder: Path, options: dict[str, int]
) -> Any:
    """The result of `overlap_rank.py` for one case."""
    output = folder / f"{case_name(schedule, mask, ranks_per_host)}.json"
    arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    on_two_hosts(
        [
            *(sys.executable, "-m", "torch.distributed.run", *MEETING.split()),
            *("--nproc-per-node", str(ranks_per_host), str(ROOT / "benchmarks/overlap_rank.py")),
            *("--output", str(output), "--schedule", schedule, "--mask", mask, *arguments),
        ]
    )
    return json.loads(output.read_text(encoding="utf-8"))


def bound(plan: Schedule, ranks_per_host: int) -> float:
    """The best ratio of the times without and with overlap, transfers taking C in all.

    Steps are taken one after the other, a step's transfers as what the busier host sends.
    """
    work, moved = [], []
    for each, flops in ((plan, 4), (plan.backward(), 10)):  # a pair's, by head dim
        for step in zip(*(each.steps(rank) for rank in range(plan.size)), strict=True):
            work.append(flops * max(sum(tile.work for tile in own.tiles) for own in step))
            sent = [0, 0]
            for rank, own in enumerate(step):
                for move in own.sends:
                    if move.dst // ranks_per_host != rank // ranks_per_host:
                        size = each.problem.transfer_bytes(move, 4)
                        sent[rank // ranks_per_host] += size
            moved.append(max(sent))
    scale = sum(work) / sum(moved)
    moved_time = [size * scale for size in moved]
    overlapped = sum(map(max, work, moved_time))
    return (sum(work) + sum(moved_time)) / overlapped


def cluster_of(found: dict[str, Any]) -> Cluster:
    """The simulator's cluster with the tiles and messages that the run measured."""
    tiles = [TileRow(**row) for row in found["tile_rows"]]
    links = [LinkRow(**row) for row in found["link_rows"]]
    start = load_cluster("laptop").with_ranks_per_node(found["ranks_per_host"])
    cluster, _ = calibrated(start, tiles, links, "this run", "two pretended hosts")
    idle_core = Figure(0.0, Basis.ASSUMED, "a link this slow takes little of the core's time")
    return cluster.__class__(**{**vars(cluster), "overlap_tax": idle_core})


def predicted(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Way -> seconds of both passes and of the step, simulated."""
    plan, cluster = plan_of(found), cluster_of(found)
    rows = {}
    for way in WAYS:
        seen = predict(plan, cluster, "float32", overlap=way == "overlap")
        rows[way] = {"forward": seen.forward_s, "backward": seen.backward_s, "step": seen.total_s}
    return rows


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Medians, ratios, and how far the simulator is off."""
    rounds = found.pop("rounds")
    parts = (*PASSES, "step")
    seconds = {
        way: {part: statistics.median(row[way][part] for row in rounds) for part in parts}
        for way in WAYS
    }
    simulated = predicted(found)
    tiles = statistics.median(row["no_overlap"]["sums"]["tile"] for row in rounds)
    return {
        **found,
        "tile_seconds_in_rounds": tiles,
        "transfers_over_tiles": found["transfer_seconds_alone"] / tiles,
        "bound": bound(plan_of(found), found["ranks_per_host"]),
        "seconds": seconds,
        "waiting_seconds": {
            way: statistics.median(row[way]["sums"]["wait"] for row in rounds) for way in WAYS
        },
        "ratio": {
            part: statistics.median(
                row["no_overlap"][part] / row["overlap"][part] for row in rounds
            )
            for part in parts
        },
        "ratio_by_round": [row["no_overlap"]["step"] / row["overlap"]["step"] for row in rounds],
        "simulated_seconds": simulated,
        "simulated_over_measured": {
            way: {part: simulated[way][part] / seconds[way][part] for part in parts} for way in WAYS
        },
    }


def train(folder: Path, rate: float, tokens: int) -> dict[str, Any]:
    """Train with Megatron across the link, tracing a step: report and trace of it."""
    report, traces = folder / "training.json", folder / "training"
    model = (
        "--num-layers 2 --hidden-size 256 --num-attention-heads 4 --micro-batch-size 1 "
        f"--seq-length {tokens} --max-position-embeddings {tokens} --global-batch-size 2 "
        "--mock-data --tokenizer-type NullTokenizer --vocab-size 256 --hidden-dropout 0 "
        "--attention-dropout 0 --position-embedding-type rope --train-iters 3 --lr 1e-3 "
        "--eval-iters 0 --eval-interval 1000 --log-interval 1 --use-cpu-initialization "
        "--num-workers 0 --calculate-per-token-loss --no-create-attention-mask-in-dataloader"
    )
    on_two_hosts(
        [
            *(sys.executable, "-m", "megatron_seqpar", "run", "--device", "cpu", "--nproc", "1"),
            *("--torchrun-args", MEETING, str(ROOT / "scripts" / "pretrain_gpt.py")),
            *model.split(),
            *("--sequence-parallel-size", "2", "--seqpar-schedule", "balanced"),
            *("--seqpar-report", str(report), "--seqpar-trace", str(traces)),
        ],
        rate,
    )
    content = json.loads(report.read_text(encoding="utf-8"))
    merged = trace.merged_path(traces / "step-000003")
    return {
        "summary": content["summary"],
        "trace": str(merged.relative_to(folder)),
        "by_rank": {str(rank): totals for rank, totals in trace.summary(merged).items()},
    }


def show(cases: list[dict[str, Any]]) -> None:
    """The table."""
    table = Table(title="Transfers as long as tiles: seconds of a step (medians)")
    for column in (
        "schedule", "mask", "ranks", "tiles", "transfers", "link, MiB/s", "no overlap", "overlap",
        "ratio", "bound", "simulated / measured",
    ):  # fmt: skip
        table.add_column(column, justify="left" if column in ("schedule", "mask") else "right")
    for case in cases:
        off = case["simulated_over_measured"]
        table.add_row(
            case["schedule"],
            case["mask"],
            str(case["ranks"]),
            f"{case['tile_seconds_in_rounds']:.2f}",
            f"{case['transfer_seconds_alone']:.2f}",
            f"{case['rate_bytes_per_second'] / MIB:.1f}",
            f"{case['seconds']['no_overlap']['step']:.2f}",
            f"{case['seconds']['overlap']['step']:.2f}",
            f"{case['ratio']['step']:.3f}",
            f"{case['bound']:.3f}",
            f"{off['no_overlap']['step']:.2f}, {off['overlap']['step']:.2f}",
        )
    Console(width=130).print(table)
    for case in cases:
        share = case["transfers_over_tiles"]
        if abs(share - 1) > FAR_OFF:
            print(
                f"{case['schedule']}, {case['mask']}: the machine's speed changed while this ran; "
                f"transfers took {share:.2f} of what tiles took, not 1. Run it on a quiet machine."
            )


def main(
    case: Annotated[
        list[str] | None,
        typer.Option(help="SCHEDULE:RANKS of a host[:MASK]; may be given several times."),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Of the whole sequence.")] = 8192,
    heads: int = 8,
    kv_heads: int = 2,
    dim: int = 64,
    rounds: Annotated[int, typer.Option(min=1)] = 7,
    training_tokens: Annotated[
        int, typer.Option(help="Sequence length of the traced training run; 0 for none.")
    ] = 4096,
    output: Annotated[Path | None, typer.Option(help="Write JSON here, and a PNG beside.")] = None,
    work: Annotated[Path, typer.Option(help="Folder for raw results and traces.")] = Path(
        "runs/overlap"
    ),
) -> None:
    """Measure and print; see the text at the top of this file."""
    work = work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    options = {"tokens": tokens, "heads": heads, "kv-heads": kv_heads, "dim": dim, "rounds": rounds}
    found = []
    for text in case or CASES:
        schedule, ranks, mask = (*text.split(":", 2), "causal")[:3]
        found.append(summary(measure(schedule, int(ranks), mask, work, options)))
    show(found)
    result: dict[str, Any] = {**result_file.describe(), "dtype": "float32", "cases": found}
    if training_tokens:
        result["training"] = train(work, found[0]["rate_bytes_per_second"], training_tokens)
        print(f"trace of a training step: {work / result['training']['trace']}")
    if output is not None:
        result_file.write(result, output)
        overlap_plot.save(found, work, output.with_suffix(".png"))
        print(f"{output}\n{output.with_suffix('.png')}")


if __name__ == "__main__":
    typer.run(main)
