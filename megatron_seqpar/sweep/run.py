# SPDX-License-Identifier: Apache-2.0
"""Run a sweep from its file to its CSV, report and picture."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_seqpar.data import Corpus
from megatron_seqpar.errors import SeqParError
from megatron_seqpar.experiments.corpus import corpus_of, fingerprint, unmade
from megatron_seqpar.experiments.execute import execute
from megatron_seqpar.experiments.job import Job
from megatron_seqpar.experiments.machine import FUSED_KERNELS, Machine, look
from megatron_seqpar.experiments.peaks import peak_of_rows
from megatron_seqpar.experiments.run_all import refused, run_job
from megatron_seqpar.experiments.setting import read_setting
from megatron_seqpar.experiments.store import Store, slug
from megatron_seqpar.experiments.training import Training
from megatron_seqpar.mfu import Model
from megatron_seqpar.shipped import pretraining_script
from megatron_seqpar.sweep import plot, report, slurm
from megatron_seqpar.sweep.columns import csv_row, write_csv
from megatron_seqpar.sweep.space import Point, Space


def run_sweep(
    path: Path, folder: Path, *, retry: bool, fresh: bool, dry_run: bool, top: int
) -> None:
    """Do what `megatron-seqpar sweep` says. Raises SeqParError for a wrong file."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 170)
    space = read_setting(Space, path)
    machine = _machine(space)
    corpus = (
        unmade(space.data, folder / "data", key=space.json_key)
        if dry_run
        else corpus_of(space.data, folder / "data", console, key=space.json_key)
    )
    base = _base(space, corpus, folder)
    model = base.sizes()
    points, left_out = space.points(_kernel(space, machine), model)
    for constraint, count in left_out.most_common():
        console.print(f"left out of the grid: {count} combinations: {constraint}", markup=False)
    if not points:
        raise SeqParError(f"{path}: no combination of the grid can be run")
    if dry_run:
        for label, job in _jobs(points, base, model, space, machine):
            console.print(f"# {label}", markup=False)
            line = f"# not run: {job}" if isinstance(job, str) else job.shell()
            console.print(line, markup=False, soft_wrap=True)
        return
    if space.executor == "sbatch":
        slurm.check_slurm()
    if fresh:
        shutil.rmtree(folder / "rows", ignore_errors=True)
    data = fingerprint(corpus)
    store = Store(folder)
    runner = slurm.submit(space.slurm) if space.executor == "sbatch" else execute
    console.print(
        f"device: {machine.name}; {len(points)} layouts; rows and logs: {folder}", markup=False
    )

    def show(line: str) -> None:
        console.print(line, markup=False)

    rows: list[dict[str, Any]] = []
    table: list[dict[str, Any]] = []
    try:
        for number, point in enumerate(points, start=1):
            facts = {
                "label": _label(point),
                "model": space.model.stem,
                "layout": {**asdict(point.layout), "dp": point.layout.dp},
                "topology": _topology(point, space),
            }
            header = f"[{number}/{len(points)}] {_label(point)}"
            why = point.layout.impossible(model, space.global_batch_size)
            if why:
                show(f"{header}: not run: {why}")
                rows.append(refused(_label(point), why, {**facts, "ranks": point.layout.ranks}))
            else:
                job = _job(point, base, space, machine)
                rows.append(
                    run_job(
                        job, store, data, facts, show, header=header, again=retry, runner=runner
                    )
                )
            # after every row, so that what is there can be looked at, and is there after a kill
            table = _cells(rows, points, model, space, path)
            write_csv(folder / "sweep.csv", table)
    except KeyboardInterrupt:
        raise SeqParError(
            f"interrupted after {len(rows)} of {len(points)} rows: they are in "
            f"{folder / 'sweep.csv'}, and the same command goes on with the next"
        ) from None
    console.print()
    for each in report.best_tables(table, top):
        console.print(each)
    console.print(report.effect_table(table))
    failed = report.failure_table(table)
    if failed is not None:
        console.print(failed)
    title = (
        f"{space.model.stem}: {model.layers} layers, hidden {model.hidden}, {model.query_heads} "
        f"query heads, {model.kv_heads} KV heads; {machine.name}"
    )
    plot.plot(table, title, folder / "sweep.png")
    show(f"rows: {folder / 'sweep.csv'}    picture: {folder / 'sweep.png'}")


def jobs_of_file(path: Path) -> list[tuple[str, Job | str]]:
    """What `sweep` would run of a file: labels, and jobs or why there is none. Makes nothing."""
    space = read_setting(Space, path)
    folder = Path("runs") / "sweep" / path.stem
    machine = _machine(space)
    base = _base(space, unmade(space.data, folder / "data", key=space.json_key), folder)
    points, _ = space.points(_kernel(space, machine), base.sizes())
    return _jobs(points, base, base.sizes(), space, machine)


def _jobs(
    points: Sequence[Point], base: Training, model: Model, space: Space, machine: Machine
) -> list[tuple[str, Job | str]]:
    return [
        (
            _label(point),
            point.layout.impossible(model, space.global_batch_size)
            or _job(point, base, space, machine),
        )
        for point in points
    ]


def _base(space: Space, corpus: Corpus, folder: Path) -> Training:
    return Training(
        space.model,
        corpus,
        folder / "cache",
        space.steps,
        sequence_length=0,  # each row has its own
        batch=space.global_batch_size,
        seed=space.seed,
        changes=space.changes,
        extra=space.arguments,
    )


def _kernel(space: Space, machine: Machine) -> str:
    return FUSED_KERNELS[machine.device] if space.kernel == "auto" else space.kernel


def _machine(space: Space) -> Machine:
    # sbatch runs elsewhere: this machine need not have the GPUs
    if space.executor == "sbatch":
        device = "cuda" if space.device == "auto" else space.device
        return Machine(device, "SLURM", space.slurm.ranks_per_node)
    return look(space.device, space.launch.ranks_per_node or 1)


def _cells(
    rows: Sequence[dict[str, Any]], points: Sequence[Point], model: Model, space: Space, path: Path
) -> list[dict[str, Any]]:
    peak = peak_of_rows(rows, space.peak_tflops)
    name, batch = space.name or path.stem, space.global_batch_size
    pairs = zip(rows, points, strict=False)  # rows so far
    return [csv_row(row, point, model, name, batch, peak) for row, point in pairs]


def _label(point: Point) -> str:
    layout = point.layout
    return f"{point.sequence_length:,} tokens, {layout.ranks} ranks: {layout.label()}"


def _topology(point: Point, space: Space) -> str:
    ranks = point.layout.ranks
    each = space.launch.ranks_per_node or ranks
    if space.executor == "sbatch":
        each = min(space.slurm.ranks_per_node, ranks)
    return f"{ranks} ranks on {max(1, ranks // each)} node(s)"


def _job(point: Point, base: Training, space: Space, machine: Machine) -> Job:
    layout = point.layout
    training = replace(base, sequence_length=point.sequence_length, micro_batch=layout.micro_batch)
    arguments = [*training.arguments(), *machine.arguments(), *layout.arguments()]
    return Job(
        name=slug(_label(point)),
        ranks=layout.ranks,
        arguments=tuple(arguments),
        script=(space.script or pretraining_script()).absolute(),
        device=machine.device,
        launch=space.launching(),
        environment=tuple(sorted(space.environment.items())),
        limit_bytes=space.limit_bytes(layout.ranks, machine.device),
        seconds=space.seconds,
    )
