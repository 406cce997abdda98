# SPDX-License-Identifier: Apache-2.0
"""What a rank holds in real training steps on a CPU, beside what the planner predicts.

    python -m benchmarks.planner_memory --output benchmarks/results/planner_memory.json

Each row is a layout: it is started with the flags that `plan` prints for it, on as many ranks as it
has, and torch's allocator is accounted for from before the model is built (`planner_memory_rank`).
Compared is the most that the fullest rank holds within the second step.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_seqpar.bench.prepare import prepare
from megatron_seqpar.experiments.execute import execute
from megatron_seqpar.experiments.job import Job
from megatron_seqpar.mfu import model_from_flags
from megatron_seqpar.planner import Constants, Layout
from megatron_seqpar.planner.launch import layout_flags
from megatron_seqpar.planner.memory import stage_memory, stages
from megatron_seqpar.planner.memory_kernels import CPU

RANK_SCRIPT = Path(__file__).resolve().parent / "planner_memory_rank.py"
MODEL = "llama3-mini"
EXPERTS = {
    "num-experts": 4,
    "moe-router-topk": 2,
    "moe-ffn-hidden-size": 448,
    "moe-token-dispatcher-type": "alltoall",
    "moe-router-force-load-balancing": True,  # else chance decides which rank has more tokens
}
MIB = 2**20
COMMAND = "python -m benchmarks.planner_memory --output benchmarks/results/planner_memory.json"


@dataclass(frozen=True)
class Case:
    """A layout, and changes to the model's flags."""

    name: str
    layout: Layout
    changes: dict[str, Any] = field(default_factory=dict)


def cases() -> list[Case]:
    """What is run: every axis and every way to save memory, lengths that weigh differently."""
    found = []

    def add(name: str, length: int, batch: int = 1, changes: Any = None, **layout: Any) -> None:
        made = Layout(length, batch, **{"element": 4, "zero": 0, **layout})
        found.append(Case(name, made, changes or {}))

    for length in (512, 4096):
        add("plain", length)
        add("full recompute", length, recompute="full")
        add("attention-output", length, recompute="attention-output")
    add("mlp", 4096, recompute="mlp")
    add("attention-qkv", 4096, recompute="attention-qkv")
    pieces = {"mlp_chunks": 8, "loss_chunks": 8}
    add("pieces", 4096, **pieces)
    add("attention-output, pieces", 4096, recompute="attention-output", **pieces)
    add("attention-output, pieces of the loss", 4096, recompute="attention-output", loss_chunks=8)
    add("four micro-batches", 2048, 4)
    add("bf16", 4096, element=2)
    add("bf16, attention-output, pieces", 4096, element=2, recompute="attention-output", **pieces)
    # the same vocabulary, which is padded to a multiple of this times TP, and a KV head a rank
    split = {"make-vocab-size-divisible-by": 2004, "num-query-groups": 2}
    add("TP 2", 4096, 1, split, tp=2)
    add("TP 2, TP-SP", 4096, 1, split, tp=2, tp_sp=True)
    again = {"tp": 2, "tp_sp": True, "recompute": "attention-output"}
    add("TP 2, TP-SP, attention-output", 4096, 1, split, **again)
    add("TP 2, TP-SP, attention-output, pieces", 4096, 1, split, **again, **pieces)
    add("SP 2", 8192, sp=2)
    add("SP 2, attention-output, pieces", 8192, sp=2, recompute="attention-output", **pieces)
    add("PP 2", 2048, 4, pp=2)
    add("PP 2, virtual stages", 2048, 4, {"num-layers": 4}, pp=2, vpp=2)
    add("DP 2, ZeRO 1", 2048, 4, dp=2, zero=1)
    add("experts", 2048, 1, EXPERTS)
    add("EP 2", 2048, 2, EXPERTS, dp=2, ep=2)
    return found


def predicted(flags: dict[str, Any], layout: Layout) -> dict[str, float]:
    """Bytes of the fullest rank by component: no CUDA context, nothing for fragmentation."""
    vocabulary = flags["make-vocab-size-divisible-by"] * layout.tp  # to which Megatron pads it
    model = model_from_flags({**flags, "vocab-size": vocabulary})
    exact = Constants().changed(
        {"activation_slack": 1.0, "context_bytes": 1.0, "flight_slack": 0.0}
    )
    each = [stage_memory(model, layout, exact, stage, CPU) for stage in stages(layout)]
    return max(each, key=lambda memory: memory.total).parts()


def main() -> None:
    """Parse the arguments, run what is missing, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/bench/planner_memory"))
    parser.add_argument("--only", help="rows whose name contains this")
    arguments = parser.parse_args()
    here = prepare(
        "cpu", MODEL, None, "stdlib", arguments.work, None, None, None, Console(stderr=True)
    )
    rows = []
    for number, case in enumerate(cases()):
        if arguments.only and arguments.only not in case.name:
            continue
        layout = case.layout
        training = here.training(layout.sequence_length, 2, case.changes)
        account = arguments.work.absolute() / f"account-{number}"
        words = [*training.arguments(), *layout_flags(layout), "--seqpar-kernel", "cpu"]
        words = [str(account), str(here.trainer.script), *words]
        for stale in account.parent.glob(account.name + ".*"):
            stale.unlink()
        job = Job(case.name, layout.ranks, tuple(words), RANK_SCRIPT, "cpu")
        outcome = execute(job, arguments.work / "runs" / str(number), lambda line: None)
        ranks = [json.loads(p.read_text()) for p in account.parent.glob(account.name + ".*")]
        if outcome.status != "ok" or len(ranks) != layout.ranks:
            raise SystemExit(f"{case.name}: {outcome.status}: {outcome.reason}")
        fullest = max(ranks, key=lambda rank: rank["most"])
        rows.append(
            {
                "name": case.name,
                "changes": case.changes,
                "layout": asdict(layout),
                "flags": layout_flags(layout),
                "held_before_bytes": fullest["before"],
                "peak_bytes": fullest["most"],
                "ranks": sorted(ranks, key=lambda rank: rank["rank"]),
            }
        )
        print(f"{case.name}: {fullest['most'] / MIB:.1f} MiB", flush=True)
        if arguments.output is not None:
            result = {**here.result("planner_memory"), "command": COMMAND, "rows": rows}
            arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    show(here.training(1, 2, {}).model_flags(), rows)


def show(flags: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """A table of measured and predicted."""
    shown = Table(title="the fullest rank, MiB")
    for name in ("row", "tokens", "before the step", "most in it", "predicted", "off by, %"):
        shown.add_column(name, justify="left" if name == "row" else "right")
    for row in rows:
        total = sum(predicted({**flags, **row["changes"]}, Layout(**row["layout"])).values())
        shown.add_row(
            row["name"],
            str(row["layout"]["sequence_length"]),
            *(
                f"{value / MIB:.1f}"
                for value in (row["held_before_bytes"], row["peak_bytes"], total)
            ),
            f"{100 * (total / row['peak_bytes'] - 1):+.1f}",
        )
    Console(width=110).print(shown)


if __name__ == "__main__":
    main()
