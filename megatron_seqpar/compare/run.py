# SPDX-License-Identifier: Apache-2.0
"""Run a comparison from its file to its table, JSON and picture."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_seqpar.compare import longest, plot, result, table
from megatron_seqpar.compare.config import CompareConfig
from megatron_seqpar.compare.ways import UNFUSED, Way, ways
from megatron_seqpar.data import Corpus
from megatron_seqpar.errors import SeqParError
from megatron_seqpar.experiments import host
from megatron_seqpar.experiments.corpus import corpus_of, fingerprint, unmade
from megatron_seqpar.experiments.job import Job
from megatron_seqpar.experiments.layout import STOCK
from megatron_seqpar.experiments.machine import FUSED_KERNELS, Machine, look
from megatron_seqpar.experiments.peaks import peak_of_rows
from megatron_seqpar.experiments.run_all import refused, run_job
from megatron_seqpar.experiments.setting import read_setting
from megatron_seqpar.experiments.store import Store, slug, write_whole
from megatron_seqpar.experiments.training import Training, flags
from megatron_seqpar.mfu import Model
from megatron_seqpar.shipped import pretraining_script


def run_comparison(
    config: CompareConfig,
    folder: Path,
    json_file: Path,
    picture: Path,
    console: Console,
    *,
    retry: bool = False,
    fresh: bool = False,
    dry_run: bool = False,
    loss_tables: bool = False,
) -> list[dict[str, Any]]:
    """Do what `megatron-seqpar compare` says, and return all rows.

    Raises SeqParError for settings that cannot be, and when it is interrupted.
    """
    if dry_run:
        for label, job in planned(config, folder):
            console.print(f"# {label}", markup=False)
            line = f"# not run: {job}" if isinstance(job, str) else job.shell()
            console.print(line, markup=False, soft_wrap=True)
        return []
    machine = _machine(config)
    corpus = corpus_of(config.data, folder / "data", console, key=config.json_key, fresh=fresh)
    trainings = _trainings(config, corpus, folder)
    model = next(iter(trainings.values())).sizes()
    todo = _ways(config, model, machine)
    if fresh:
        shutil.rmtree(folder / "rows", ignore_errors=True)
    store = Store(folder)
    console.print(
        f"device: {machine.name}; {config.ranks} ranks; rows and logs: {folder}", markup=False
    )
    for note in machine.notes:
        console.print(f"note: {note}", markup=False)
    data = fingerprint(corpus)
    by_length: dict[str, list[dict[str, Any]]] = {}
    try:
        for length, training in trainings.items():
            by_length[str(length)] = [
                _row(
                    way,
                    training,
                    config,
                    machine,
                    store,
                    data,
                    console,
                    f"[{number}/{len(todo)}]",
                    retry,
                )
                for number, way in enumerate(todo, start=1)
            ]
        reached = _longest(todo, trainings, config, machine, store, data, console)
    except KeyboardInterrupt:
        raise SeqParError(
            "interrupted: finished rows are kept, and the same command goes on with the next"
        ) from None
    every = [row for rows in by_length.values() for row in rows]
    peak = peak_of_rows(every, config.peak_tflops)
    judged = {
        length: result.judge(rows, model, int(length), config.global_batch_size, peak)
        for length, rows in by_length.items()
    }
    unfused = any(w.layout.kernel == STOCK for w in todo) and not machine.has_transformer_engine
    said = result.notes(every, peak, UNFUSED if unfused else "")
    title = (
        f"{config.model.stem}: {model.layers} layers, hidden {model.hidden}, "
        f"{model.query_heads} query heads, {model.kv_heads} KV heads; {machine.name}"
    )
    for name, rows in judged.items():
        console.print()
        console.print(table.cost_table(rows, f"{title}; {int(name):,} tokens a sequence"))
        for line in table.failures(rows):
            console.print(line, markup=False)
        if loss_tables:
            console.print(table.loss_table(rows))
        traffic = table.traffic_table(rows)
        if traffic is not None:
            console.print(traffic)
    if reached:
        console.print(table.longest_table(reached, _limit(config, machine)))
    for note in said:
        console.print(f"note: {note}", markup=False)
    content = {
        **host.describe(),
        "model": trainings[config.seq_length[0]].model_flags(),
        "setting": config.model_dump(mode="json", by_alias=True, exclude={"model", "script"}),
        "peak": None if peak is None else asdict(peak),
        "notes": said,
        "by_length": judged,
        "longest": reached,
    }
    write_whole(json_file, json.dumps(content, indent=1) + "\n")
    plot.plot(judged, title, picture, reached, _limit(config, machine))
    console.print(f"result: {json_file}    picture: {picture}", markup=False)
    return [row for rows in judged.values() for row in rows]


def jobs_of_file(path: Path) -> list[tuple[str, Job | str]]:
    """What `compare` would run of a file: labels, and jobs or why there is none."""
    return planned(read_setting(CompareConfig, path), Path("runs") / "compare" / path.stem)


def planned(config: CompareConfig, folder: Path) -> list[tuple[str, Job | str]]:
    """The runs of a comparison without running or making anything: see `jobs_of_file`."""
    machine = _machine(config)
    corpus = unmade(config.data, folder / "data", key=config.json_key)
    trainings = _trainings(config, corpus, folder)
    todo = _ways(config, next(iter(trainings.values())).sizes(), machine)
    return [
        (
            f"{length:,} tokens, {way.label}",
            _why_not(way, config, training) or _job(way, training, config, machine),
        )
        for length, training in trainings.items()
        for way in todo
    ]


def _machine(config: CompareConfig) -> Machine:
    return look(config.device, config.launch.ranks_per_node or config.ranks)


def _ways(config: CompareConfig, model: Model, machine: Machine) -> list[Way]:
    chosen = FUSED_KERNELS[machine.device] if config.kernel == "auto" else config.kernel
    return ways(config, model, chosen, has_te=machine.has_transformer_engine)


def _trainings(config: CompareConfig, corpus: Corpus, folder: Path) -> dict[int, Training]:
    return {
        length: Training(
            config.model,
            corpus,
            folder / "cache",
            config.steps,
            length,
            config.global_batch_size,
            config.seed,
            config.micro_batch_size,
            config.changes,
            config.arguments,
        )
        for length in config.seq_length
    }


def _longest(
    todo: list[Way],
    trainings: dict[int, Training],
    config: CompareConfig,
    machine: Machine,
    store: Store,
    data: str,
    console: Console,
) -> dict[str, dict[str, Any]]:
    """The longest sequence of each way that can run, by its label; empty when not asked for."""
    section = config.longest
    if section is None:
        return {}
    base = replace(next(iter(trainings.values())), steps=longest.STEPS)
    found = {}
    for way in todo:
        if _why_not(way, config, base):
            continue

        def job_of(length: int, way: Way = way) -> Job:
            return _job(way, replace(base, sequence_length=length), config, machine)

        # every rank has as many tokens, and TP-SP and zigzag chunks divide
        unit = 256 * config.ranks
        found[way.label] = longest.longest(
            job_of, section, store, data, _printer(console), way.label, unit
        )
    return found


def _limit(config: CompareConfig, machine: Machine) -> str:
    if machine.device == "cpu" and config.longest is not None:
        return f"{config.longest.memory_mib} MiB for a rank to take once training begins"
    return f"the memory of a {machine.name}"


def _printer(console: Console) -> Callable[[str], None]:
    return lambda line: console.print(line, markup=False)


def _why_not(way: Way, config: CompareConfig, training: Training) -> str | None:
    """Why a way cannot run, None if it can."""
    model = replace(training, changes={**training.changes, **way.changes}).sizes()
    return way.unavailable or way.layout.impossible(model, config.global_batch_size)


def _job(way: Way, training: Training, config: CompareConfig, machine: Machine) -> Job:
    trained = replace(training, changes={**training.changes, **way.changes})
    arguments = [*trained.arguments(), *machine.arguments(), *way.layout.arguments()]
    launch = config.launching()
    if way.layout.ranks == 1:  # one rank has no hosts to be spread over
        launch = replace(launch, prefix=(), torchrun_args="", ranks_per_node=None)
    return Job(
        name=slug(f"{training.sequence_length}-{way.label}"),
        ranks=way.layout.ranks,
        arguments=(*arguments, *flags(way.extra)),
        script=config.script or pretraining_script(),
        device=machine.device,
        launch=launch,
        environment=tuple(sorted(config.environment.items())),
        limit_bytes=config.limit_bytes(way.layout.ranks, machine.device),
        seconds=config.seconds,
    )


def _row(
    way: Way,
    training: Training,
    config: CompareConfig,
    machine: Machine,
    store: Store,
    data: str,
    console: Console,
    place: str,
    retry: bool,
) -> dict[str, Any]:
    layout = way.layout
    facts = {
        "label": way.label,
        "attention": way.attention,
        "layout": {**asdict(layout), "dp": layout.dp},
        "changes": dict(way.changes),
        "note": way.note,
    }
    header = f"{place} {training.sequence_length:,} tokens, {way.label}, {layout.ranks} rank(s)"
    why = _why_not(way, config, training)
    if why:
        console.print(f"{header}: not run: {why}", markup=False)
        return refused(way.label, why, {**facts, "ranks": layout.ranks})
    job = _job(way, training, config, machine)

    return run_job(job, store, data, facts, _printer(console), header=header, again=retry)
