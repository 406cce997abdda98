# SPDX-License-Identifier: Apache-2.0
"""A training step of one model: stock Megatron against this plugin, every way.

Every way trains the same model on the same tokens through the launcher, in turn. Ways called stock
use Megatron's own attention, which without Transformer Engine is unfused and holds an s x s matrix
a head; all others use one fused kernel, so that what differs is the parallel layout, recomputation
and pieces. A way that needs too much memory is a row that says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..errors import SeqParError
from ..experiments.execute import Outcome
from ..experiments.layout import STOCK, Layout
from ..experiments.training import Training
from ..mfu import Peak
from .cells import Cell, Measured, Save, continued, ran
from .layers import Fitting, layers_that_fit
from .ranks import Row, say
from .training import Trainer, Way, chunked, rates

STOCK_WAY = "stock"
ONE = "SP=1"
FRUGAL = "recompute + chunks"
ATTENTION_OUTPUT = "attention-output"


def ways_of(ranks: int, chunks: int, kernel: str) -> dict[str, Way]:
    """Every way on one rank and on `ranks`, by name; see `defaults` for those run by default."""
    one = Layout(1, kernel=kernel)
    found = {
        STOCK_WAY: Layout(1, kernel=STOCK),
        "stock, full recompute": Layout(1, kernel=STOCK, recompute="full"),
        ONE: one,
        f"{ONE}, full recompute": replace(one, recompute="full"),
        f"{ONE}, recompute": replace(one, recompute=ATTENTION_OUTPUT),
        f"{ONE}, {FRUGAL}": frugal(one, chunks),
    }
    if ranks > 1:
        sp = Layout(ranks, sp=ranks, kernel=kernel)
        tp = Layout(ranks, tp=ranks, kernel=kernel)
        found |= {
            f"SP={ranks}": sp,
            f"SP={ranks}, {FRUGAL}": frugal(sp, chunks),
            f"TP={ranks}": tp,
            f"TP={ranks} + TP-SP": replace(tp, tp_sp=True),
            f"TP={ranks}, stock": replace(tp, kernel=STOCK),
            f"TP={ranks} + TP-SP, stock": replace(tp, tp_sp=True, kernel=STOCK),
        }
    return {name: Way(name, layout) for name, layout in found.items()}


def frugal(layout: Layout, chunks: int) -> Layout:
    """The layout with all that saves memory."""
    return chunked(replace(layout, recompute=ATTENTION_OUTPUT), chunks)


def defaults(ranks: int, device: str) -> list[str]:
    """Names of the ways run when none are asked for: on a CPU those that tell most."""
    every = list(ways_of(ranks, 1, ""))
    if device == "cuda":
        return every
    wanted = [STOCK_WAY, ONE, f"{ONE}, {FRUGAL}", f"SP={ranks}", f"TP={ranks} + TP-SP"]
    wanted.append(f"TP={ranks} + TP-SP, stock")
    return [name for name in every if name in wanted]


def chosen(ways: Mapping[str, Way], names: Sequence[str]) -> list[Way]:
    """The ways of these names, in the order of `ways`. SeqParError for one that there is not."""
    for name in names:
        if name not in ways:
            raise SeqParError(f"--ways {name}: the ways are {'; '.join(ways)}")
    return [way for name, way in ways.items() if name in names]


def frugal_way(ways: Mapping[str, Way]) -> Way:
    """The way that needs least memory: on all ranks, with recomputation and pieces."""
    return [way for name, way in ways.items() if name.endswith(FRUGAL)][-1]


def fit_layers(
    trainer: Trainer, ways: Mapping[str, Way], training: Training, limit_bytes: int
) -> Fitting:
    """Layers of the model that fit with the most frugal way; see `layers.py`."""
    way, most = frugal_way(ways), int(training.model_flags()["num-layers"])

    def attempt(layers: int) -> tuple[str, int | None]:
        changed = replace(training, steps=2, changes={**training.changes, "num-layers": layers})
        outcome: Outcome = trainer.run(way, changed, lambda line: None)
        peak = outcome.report["summary"]["peak_memory_bytes"] if outcome.report else None
        known = outcome.status if outcome.status in ("ok", "oom") else outcome.reason
        say(f"{layers} layers, {training.sequence_length:,} tokens, {way.name}: {outcome.status}")
        return known, peak

    return layers_that_fit(attempt, most, limit_bytes)


def measure(
    trainer: Trainer,
    ways: Sequence[Way],
    trainings: Sequence[Training],
    rounds: int,
    limit_gib: float,
    save: Save,
) -> list[Row]:
    """Rows of every training (a length each) and way; `save` gets what there is after every run."""
    by_name = {way.name: way for way in ways}
    bases = [name for name in (STOCK_WAY, ONE) if name in by_name]
    on_gpu = trainer.machine.device == "cuda"

    def reference(name: str, measured: Measured) -> str | None:
        # weights made on GPUs depend on the TP rank, so such losses say nothing of one another
        if name == ONE or (on_gpu and by_name[name].layout.tp > 1):
            return None
        others = (ONE, f"{ONE}, {FRUGAL}", STOCK_WAY)
        return next((other for other in others if other != name and ran(other, measured)), None)

    def facts(way: Way) -> Row:
        layout = way.layout
        return {"ranks": layout.ranks, "sp": layout.sp, "tp": layout.tp, "tp_sp": layout.tp_sp}

    rows: list[Row] = []
    for training in trainings:

        def more(way: Way, row: Row, peak: Peak | None, training: Training = training) -> Row:
            return rates(training, row, way.layout.ranks, peak)

        cell = Cell(
            trainer, training, by_name, rounds, limit_gib, bases, reference, facts, more
        )  # fmt: skip
        rows += cell.run(continued(save, rows))
        save(rows)
    return rows
