# SPDX-License-Identifier: Apache-2.0
"""What `megatron-seqpar run` is going to do: processes, meeting point, arguments; and --dry-run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from megatron_seqpar.errors import SeqParError

if TYPE_CHECKING:
    from megatron_seqpar.experiments.run_file import RunConfig
    from megatron_seqpar.launcher.dry_run import Checked

CORPUS = Path("runs/data/stdlib")
PREFIX = f"{CORPUS}_text_document"
"""Where the text of Python's own library is kept, as `prepare-data` keeps it."""
_MEETING = ("--node-rank", "--master-addr")


@dataclass
class RunPlan:
    """A run before it starts.

    Attributes:
        script: the pretraining script.
        arguments: of it, from a file.
        nodes, nproc: machines, and processes of each; None where nobody said.
        device, environment: from a file.
        estimate: lines of what the planner thinks of it.
        makes: prefix of the corpus that is made before the run starts.
    """

    script: str
    arguments: list[str]
    nodes: int | None = None
    nproc: int | None = None
    device: str = "auto"
    environment: dict[str, str] = field(default_factory=dict)
    estimate: list[str] = field(default_factory=list)
    makes: str | None = None

    def meeting(
        self, rank: int | None, address: str | None, port: int, *, placeholders: bool
    ) -> list[str]:
        """torchrun's options by which several machines find one another; none for one machine.

        With `placeholders` what was not said stands there as a word in capitals. Raises SeqParError
        for what is missing without them, and for a machine that is not one of the run's.
        """
        if self.nodes is None or self.nodes == 1:
            return []
        if self.nodes < 1:
            raise SeqParError(f"--nodes {self.nodes}: use 1 or more")
        if rank is not None and not 0 <= rank < self.nodes:
            raise SeqParError(
                f"--node-rank {rank} with --nodes {self.nodes}: use 0 to {self.nodes - 1}"
            )
        given = {"--node-rank": rank, "--master-addr": address}
        missing = [name for name, value in given.items() if value is None]
        if missing and not placeholders:
            raise SeqParError(
                f"{' and '.join(missing)} is needed on each of {self.nodes} nodes (or "
                f"{' and '.join(_variable(name) for name in missing)} in the environment); "
                "--nodes 1 runs on this machine alone"
            )
        words = [f"--nnodes={self.nodes}"]
        words += [
            f"{name}={_variable(name) if value is None else value}" for name, value in given.items()
        ]
        return [*words, f"--master-port={port}"]

    def show(
        self,
        script: str,
        script_args: list[str],
        device: str,
        options: list[str],
        *,
        plugin: bool,
        check: bool,
    ) -> None:
        """Print the command, and what its arguments come to as comments of a shell.

        Raises SeqParError for what Megatron or the plugin would refuse.
        """
        from megatron_seqpar import launcher
        from megatron_seqpar.launcher.torchrun import torchrun_arguments

        each = self.nproc or 1
        arguments = torchrun_arguments(
            script, script_args, each, device, plugin=plugin, torchrun_args=options
        )
        typer.echo(launcher.torchrun_command(arguments))
        for word in options:
            name, _, value = word.partition("=")
            if name in _MEETING and value == _variable(name):
                what = f"0 to {(self.nodes or 1) - 1}" if "rank" in name else "name of node 0"
                typer.echo(f"# {value}: {what}, the same command on each node")
        if not check:
            return
        from megatron_seqpar.launcher.dry_run import Order
        from megatron_seqpar.launcher.dry_run import check as checked

        ranks = each * (nodes_of(options) or 1)
        [found] = checked([Order(script, tuple(script_args), ranks, each)], device, plugin=plugin)
        for line in (*describe(found, ranks), *self.estimate):
            if self.makes is None or f"no {self.makes}.idx" not in line:
                typer.echo(f"# {line}")
        if found.error is not None:
            raise SeqParError(found.error)


def _variable(name: str) -> str:
    """'--master-addr' as a variable's name."""
    return name.strip("-").replace("-", "_").upper()


def nodes_of(options: Sequence[str]) -> int | None:
    """Nodes that torchrun's options ask for; of a range, the least. None where they do not say."""
    words = [part for word in options for part in word.split("=", 1)]
    for index, word in enumerate(words[:-1]):
        if word == "--nnodes":
            least = words[index + 1].partition(":")[0]
            return int(least) if least.isdecimal() else None
    return None


def describe(found: Checked, ranks: int) -> list[str]:
    """A check in lines: the sizes of the run, what is not at its default, what the plugin says."""
    if found.error is not None:
        return [*found.said, f"refused: {' '.join(found.error.split())}"]
    values = found.resolved
    lines = [
        f"checked: {_sizes(values, ranks)}",
        "arguments that are not at Megatron's defaults, once validated:",
        *(f"    {name} = {value}" for name, value in values.items()),
    ]
    return [*lines, *found.said, *(f"note: {note}" for note in found.notes)]


def _sizes(values: Any, ranks: int) -> str:
    axes = [
        ("TP", values.get("tensor_model_parallel_size", 1)),
        ("SP", values.get("sequence_parallel_size", 1)),
        ("PP", values.get("pipeline_model_parallel_size", 1)),
        ("DP", values.get("data_parallel_size", 1)),
    ]
    if values.get("expert_model_parallel_size", 1) > 1:
        axes.append(("EP", values["expert_model_parallel_size"]))
    said = " ".join(f"{name}={size}" for name, size in axes)
    batch, micro = values.get("global_batch_size"), values.get("micro_batch_size") or 1
    step = ""
    if batch:
        times = batch // (micro * max(1, values.get("data_parallel_size", 1)))
        step = f"; {_some(batch, 'sequence')} of {values.get('seq_length'):,} tokens a step, "
        step += f"{_some(times, 'micro-batch', 'es')} a rank"
    return f"{_some(ranks, 'rank')}, {said}{step}"


def _some(number: int, what: str, several: str = "s") -> str:
    """'1 rank', '2 ranks'."""
    return f"{number} {what}{'' if number == 1 else several}"


def plan_of_file(path: Path, nodes: int | None, nproc: int | None, *, dry_run: bool) -> RunPlan:
    """The run of a file of configs/runs; `nodes` and `nproc` go over the file's.

    Under torchrun the processes that it started count. Makes the corpus that the file asks for,
    unless `dry_run`. Raises SeqParError for a wrong file and a layout that its ranks do not allow.
    """
    import os

    from megatron_seqpar.experiments.run_file import read_run
    from megatron_seqpar.launcher.environment import under_torchrun
    from megatron_seqpar.shipped import pretraining_script

    run = read_run(path)
    nodes, nproc = nodes or run.nodes, nproc or run.nproc_per_node
    started = under_torchrun()
    ranks = int(os.environ["WORLD_SIZE"]) if started else nodes * nproc
    data = _data(run, make=not dry_run and not started)
    return RunPlan(
        script=str(run.script or _near(pretraining_script())),
        arguments=run.script_arguments(ranks, data),
        nodes=nodes,
        nproc=nproc,
        device=run.device,
        environment=dict(run.environment),
        estimate=_estimate(run, ranks) if dry_run else [],
        makes=PREFIX if run.data == "stdlib" else None,
    )


def _near(path: Path) -> Path:
    """A path as it is written from the current folder, where it lies under it."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _data(run: RunConfig, *, make: bool) -> list[str]:
    """Megatron's arguments of the run's data; a corpus of stdlib is made or must be there."""
    from megatron_seqpar.data import StandardLibrary, prepare_corpus, tokenizer_arguments
    from megatron_seqpar.experiments.run_file import DataSection, data_arguments

    if isinstance(run.data, DataSection):
        return data_arguments(run.data)
    if run.data == "mock":
        words = ["--mock-data", "--tokenizer-type", "NullTokenizer"]
        return words if "vocab-size" in run.model_flags() else [*words, "--vocab-size", "256"]
    if make:
        if run.nodes > 1:
            raise SeqParError(
                "data: stdlib is made on the machine that runs; for several nodes write a corpus "
                "to storage that they share with `megatron-seqpar prepare-data`"
            )
        prepare_corpus(StandardLibrary(), CORPUS)
    return ["--data-path", PREFIX, "--split", "100,0,0", *tokenizer_arguments()]


def _estimate(run: RunConfig, ranks: int) -> list[str]:
    """What the planner thinks of the run, where its cluster is one that the planner knows."""
    from megatron_seqpar.planner.constants_file import planner_clusters, read_planner_cluster
    from megatron_seqpar.planner.estimate import estimate
    from megatron_seqpar.simulate import split_nodes

    if run.cluster is None or split_nodes(run.cluster)[0] not in planner_clusters():
        return []
    layout, unsure = planned_layout(run, ranks)
    found = estimate(run.sizes(256), read_planner_cluster(run.cluster), layout)
    gib = 2**30
    fits = "fits" if found.fits else "DOES NOT FIT"
    return [
        f"planner, on {run.cluster}: {found.step_time:.3g} s a step, MFU {found.mfu:.0%}; "
        f"{found.peak_memory / gib:.1f} of {found.cluster.capacity.value / gib:.1f} GiB on the "
        f"fullest rank: {fits}{unsure}"
    ]


def planned_layout(run: RunConfig, ranks: int) -> tuple[Any, str]:
    """The run's layout as the planner writes it, and what it cannot know of it ("" if nothing)."""
    from megatron_seqpar.planner.layout import SCHEDULES, Layout

    said = run.laid_out(ranks)
    unsure = []
    for name in ("mlp_chunks", "loss_chunks"):
        if getattr(said, name) == "auto":
            unsure.append(f"{name.replace('_', ' ')} auto: reckoned as off")
    schedule = said.schedule if said.schedule in SCHEDULES else "balanced"
    if said.sp > 1 and schedule != said.schedule:
        unsure.append(f"schedule {said.schedule}: reckoned as {schedule}")
    layout = Layout(
        sequence_length=run.seq_length,
        global_batch=run.global_batch_size,
        tp=said.tp,
        sp=said.sp,
        pp=said.pp,
        dp=said.dp,
        ep=said.ep,
        vpp=said.vpp,
        micro_batch=said.micro_batch,
        zero=said.zero,
        recompute=said.recompute,
        tp_sp=said.tp_sp,
        schedule=schedule,
        mlp_chunks=_number(said.mlp_chunks),
        loss_chunks=_number(said.loss_chunks),
    )
    return layout, f" ({'; '.join(unsure)})" if unsure else ""


def _number(pieces: str) -> int:
    return int(pieces) if pieces.isdecimal() else 0


def check_other_file(path: Path, *, dry_run: bool, check: bool) -> bool:
    """Show the runs of a comparison or a sweep; False for a file of a single run.

    Each way is printed as its command, and checked like one. Raises SeqParError where a way that
    would be started is refused, and without `dry_run`.
    """
    from megatron_seqpar.experiments.run_file import kind_of

    kind = kind_of(path)
    if kind == "pretrain":
        return False
    if not dry_run:
        raise SeqParError(f"--config {path}: start it with `megatron-seqpar {kind} {path}`")
    from megatron_seqpar.launcher.dry_run import Order
    from megatron_seqpar.launcher.dry_run import check as checked

    if kind == "compare":
        from megatron_seqpar.compare.run import jobs_of_file
    else:
        from megatron_seqpar.sweep.run import jobs_of_file
    entries = jobs_of_file(path)
    jobs = [job for _, job in entries if not isinstance(job, str)]
    orders = []
    for job in jobs:
        each = job.launch.ranks_per_node or job.ranks
        orders.append(Order(str(job.script), job.arguments, job.ranks, each))
    found = iter(checked(orders, jobs[0].device) if check and jobs else ())
    refused = 0
    for label, entry in entries:
        typer.echo(f"# {label}")
        if isinstance(entry, str):
            typer.echo(f"# not run: {entry}")
            continue
        typer.echo(entry.shell())
        one = next(found, None)
        if one is not None:
            refused += one.error is not None
            typer.echo(f"# {describe(one, entry.ranks)[0 if one.error is None else -1]}")
    if refused:
        raise SeqParError(f"--config {path}: {refused} of {len(jobs)} runs would be refused")
    return True
