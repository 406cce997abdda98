# SPDX-License-Identifier: Apache-2.0
"""The comparison of finished runs: a table for the terminal and a picture of the losses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from megatron_seqpar.quickstart.plan import Run

MIB = 2**20


@dataclass(frozen=True)
class Result:
    """A run and the report it wrote."""

    run: Run
    report: dict[str, Any]

    @property
    def losses(self) -> list[float]:
        """Loss of each step."""
        return [step["loss"] for step in self.report["steps"]]


def reference(results: list[Result]) -> Result | None:
    """The run on one rank, which the others' losses are compared with."""
    return next((result for result in results if result.run.ranks == 1), None)


def largest_difference(losses: list[float], others: list[float]) -> float:
    """The largest relative difference between two loss curves, over the steps both have."""
    return max(abs(a - b) / abs(b) for a, b in zip(losses, others, strict=False))


def cost_table(results: list[Result]) -> Table:
    """One row a run: what it gave and what it cost."""
    base = reference(results)
    kind = results[0].report["ranks"][0]["memory"]
    device = results[0].report["device"]
    caption = f"{device['threads']} thread(s) a rank" if device["kind"] == "cpu" else None
    table = Table(title="What each way gives and costs", caption=caption)
    table.add_column("run", no_wrap=True)
    table.add_column("attention")
    table.add_column("last loss", justify="right")
    table.add_column("largest difference\nfrom one rank", justify="right")
    table.add_column("tokens/s", justify="right")
    table.add_column(f"peak memory a rank\n({kind}), MiB", justify="right")
    table.add_column("of it since\nthe start, MiB", justify="right")
    table.add_column("sent a rank\nand step, MiB", justify="right")
    for result in results:
        summary, ranks = result.report["summary"], result.report["ranks"]
        grown = max(rank["peak_memory_bytes"] - rank["start_memory_bytes"] for rank in ranks)
        if base is None:
            difference = "-"
        elif result is base:
            difference = "reference"
        else:
            difference = f"{largest_difference(result.losses, base.losses):.1e}"
        speed, sent = summary["tokens_per_second"], summary["bytes_sent_per_rank_and_step"]
        table.add_row(
            result.run.label,
            result.run.attention,
            f"{result.losses[-1]:.6f}",
            difference,
            "-" if speed is None else f"{speed:,.0f}",
            f"{summary['peak_memory_bytes'] / MIB:,.0f}",
            f"{grown / MIB:,.0f}",
            "-" if sent is None else f"{sent / MIB:,.1f}",
        )
    return table


def loss_table(results: list[Result]) -> Table:
    """One row a step: every run's loss, and the largest relative difference between any two."""
    table = Table(title="Loss of each step")
    table.add_column("step", justify="right")
    for result in results:
        table.add_column(result.run.label, justify="right")
    table.add_column("largest difference", justify="right")
    for index, steps in enumerate(zip(*(r.report["steps"] for r in results), strict=False)):
        losses = [step["loss"] for step in steps]
        spread = (max(losses) - min(losses)) / abs(min(losses))
        table.add_row(
            str(steps[0]["iteration"]),
            *(f"{loss:.6f}" for loss in losses),
            f"{spread:.1e}" if len(results) > 1 else "-",
            end_section=index == len(results[0].losses) - 1,
        )
    return table


def plot(results: list[Result], path: Path) -> None:
    """Loss curves above, differences from the one-rank run below, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    base = reference(results)
    figure, (top, bottom) = pyplot.subplots(
        2, 1, sharex=True, figsize=(8, 7), height_ratios=(2, 1), layout="constrained"
    )
    for index, result in enumerate(results):
        steps = [step["iteration"] for step in result.report["steps"]]
        style = {"linewidth": 5 - 1.2 * index, "alpha": 0.75}  # the curves lie on each other
        top.plot(steps, result.losses, label=result.run.label, **style)
        if base is not None and result is not base:
            pairs = list(zip(result.losses, base.losses, strict=False))
            bottom.plot(
                steps[: len(pairs)],
                [max(abs(a - b) / abs(b), 1e-9) for a, b in pairs],
                marker="o",
                markersize=3,
                color=top.lines[-1].get_color(),
                label=result.run.label,
            )
    model = results[0].report["model"]
    top.set_title(
        f"{model['layers']} layers, hidden {model['hidden']}, "
        f"{model['sequence_length']:,} tokens a sequence, {model['dtype']}"
    )
    top.set_ylabel("loss (nats a token)")
    top.legend()
    bottom.set_yscale("log")
    bottom.set_ylabel("relative difference\nfrom one rank")
    bottom.set_xlabel("step (equal losses are drawn at 1e-9)")
    bottom.xaxis.get_major_locator().set_params(integer=True)
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial.png")
    figure.savefig(partial, dpi=150)
    pyplot.close(figure)
    partial.replace(path)
