# SPDX-License-Identifier: Apache-2.0
"""Peak memory and step time of every way to spend memory, over the sequence length.

Each way trains the same model on the same tokens through the launcher. On a CPU memory is measured
twice: the high-water mark of the process beyond what it had before training, and, on one rank and
in a run of its own, the peak of torch's allocator within a step. Without Transformer Engine stock
attention is unfused and holds an s x s matrix a head: it is left out where that would not fit. All
others use one fused kernel, so that what differs is recomputation and pieces alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..errors import SeqParError
from ..experiments.layout import STOCK, Layout
from ..experiments.training import Training
from ..mfu import Peak
from .cells import Cell, Measured, Save, continued, ran
from .ranks import Row
from .training import Trainer, Way, chunked

BASE = "none"
REPEATED = "full recompute"
BASES = (BASE, REPEATED)


def ways_of(ranks: int, chunks: int, kernel: str) -> dict[str, Way]:
    """All ways on `ranks` ranks of the axis, by the name they have in tables and pictures."""
    ours = Layout(ranks, sp=ranks, kernel=kernel)
    # stock Megatron's own split of the sequence
    stock = Layout(ranks, cp=ranks, kernel=STOCK)
    full, kept = replace(ours, recompute="full"), replace(ours, recompute="attention-output")
    least = chunked(kept, chunks)
    offload = ("--seqpar-offload", "stash")
    found = [
        Way("stock", stock),
        Way("stock, full recompute", replace(stock, recompute="full")),
        Way(BASE, ours),
        Way(REPEATED, full),
        Way("attention-output", kept),
        Way("full recompute + mini-sequence", chunked(full, chunks)),
        Way("attention-output + mini-sequence", least),
        Way("attention-output + mini-sequence + offload", least, more=offload, gpu=True),
    ]
    return {way.name: way for way in found}


def measure(
    trainer: Trainer,
    sizes: Sequence[int],
    ways: Callable[[int], Mapping[str, Way]],
    trainings: Sequence[Training],
    rounds: int,
    limit_gib: float,
    accounted: bool,
    save: Save,
) -> list[Row]:
    """Rows of every number of ranks, length and way; `save` gets what there is after every run.

    ways: those of a number of ranks. accounted: also run each way of the first size, on a CPU, with
    an account of torch's allocator.
    """
    rows: list[Row] = []
    for ranks in sizes:
        counts = accounted and ranks == sizes[0] and trainer.machine.device == "cpu"
        for training in trainings:
            accounts: dict[str, int] = {}

            def more(
                way: Way,
                row: Row,
                peak: Peak | None,
                training: Training = training,
                counts: bool = counts,
                accounts: dict[str, int] = accounts,
            ) -> Row:
                if counts and way.name not in accounts:
                    accounts[way.name] = account(trainer, way, training)
                return {"allocator_peak_bytes": accounts.get(way.name)}

            cell = Cell(
                trainer, training, ways(ranks), rounds, limit_gib, BASES, _reference, _facts, more
            )  # fmt: skip
            rows += cell.run(continued(save, rows))
            save(rows)
    return rows


def _reference(name: str, measured: Measured) -> str | None:
    return BASE if name != BASE and ran(BASE, measured) else None


def _facts(way: Way) -> Row:
    return {"ranks": way.layout.ranks}


def account(trainer: Trainer, way: Way, training: Training) -> int:
    """Peak bytes of torch's CPU allocator in the second step, of the rank with most, in a run."""
    short = replace(training, steps=2)
    path = Path(trainer.folder) / "account.json"
    for stale in path.parent.glob("account.*.json"):
        stale.unlink()
    outcome = trainer.run(way, short, lambda line: None, account=path)
    files = sorted(path.parent.glob("account.*.json"))
    if outcome.status != "ok" or not files:
        raise SeqParError(f"{way.name}: the account of torch's allocator failed: {outcome.reason}")
    return max(int(json.loads(file.read_text())["peak_bytes"]) for file in files)
