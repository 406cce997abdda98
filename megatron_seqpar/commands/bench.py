# SPDX-License-Identifier: Apache-2.0
"""`megatron-seqpar bench attention|step|memory|collectives`: what this machine gives."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_seqpar.bench import options as opt
from megatron_seqpar.errors import SeqParError

if TYPE_CHECKING:
    from rich.console import Console

_PICTURES = (".png", ".svg", ".pdf")

bench = typer.Typer(
    name="bench",
    help="Measure attention, collectives, training steps and memory on this machine.",
    no_args_is_help=True,
)


@bench.command()
def attention(
    tokens: opt.Tokens = None,
    ranks: opt.Ranks = None,
    schedules: Annotated[
        str, typer.Option(help="Schedules, with commas; the first is what others are compared to.")
    ] = "balanced,zigzag,ring,ulysses",
    token_layouts: Annotated[
        str, typer.Option(help="contiguous, zigzag, or both with a comma.")
    ] = "contiguous",
    without_overlap: Annotated[
        bool, typer.Option("--without-overlap", help="Also each schedule without overlap.")
    ] = False,
    kernels: Annotated[
        str, typer.Option(help="Attention kernels, with commas; auto takes the first that serves.")
    ] = "auto",
    heads: Annotated[
        int | None, typer.Option(min=1, help="Query heads; default 8, or 32 on GPUs.")
    ] = None,
    kv_heads: Annotated[
        int | None, typer.Option(min=1, help="Key/value heads; default: a quarter of --heads.")
    ] = None,
    head_dim: Annotated[int | None, typer.Option(min=1, help="Default 64, or 128 on GPUs.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples.")] = 1,
    mask: Annotated[
        str, typer.Option(help="causal, full, window:LEFT[,RIGHT], prefix:LENGTH, documents:...")
    ] = "causal",
    dtype: Annotated[str | None, typer.Option(help="Default float32, or bfloat16 on GPUs.")] = None,
    node_size: opt.NodeSize = None,
    device: opt.Device = "auto",
    rounds: opt.Rounds = 5,
    json: opt.Json = None,
    plot: opt.Plot = None,
) -> None:
    """Distributed attention against one rank on the same kernel, forward and backward.

    Also under torchrun, over the ranks that it started: `torchrun ... -m megatron_seqpar bench
    attention`.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported anywhere
    from megatron_seqpar.attention.kernels import names as kernel_names
    from megatron_seqpar.attention.schedules import names as schedule_names
    from megatron_seqpar.bench import attention as measuring
    from megatron_seqpar.bench import attention_report as report
    from megatron_seqpar.bench.attention_cells import Sizes, ways_of
    from megatron_seqpar.bench.place import places
    from megatron_seqpar.bench.result import describe
    from megatron_seqpar.simulate.costs import ITEM_SIZES

    _check_files(json, plot)
    where = places(device, _counts(ranks, "--ranks"), node_size)
    gpu = all(place.device == "cuda" for place in where)
    default_heads = heads or (32 if gpu else 8)
    sizes = Sizes(
        heads=default_heads,
        kv_heads=kv_heads or max(1, default_heads // 4),
        head_dim=head_dim or (128 if gpu else 64),
        batch=batch,
        dtype=dtype or ("bfloat16" if gpu else "float32"),
        mask=mask,
    )
    if sizes.dtype not in ITEM_SIZES:
        raise SeqParError(f"--dtype {dtype}: use one of {', '.join(ITEM_SIZES)}")
    if sizes.heads % sizes.kv_heads:
        raise SeqParError(
            f"--heads {sizes.heads} --kv-heads {sizes.kv_heads}: KV heads must divide query heads"
        )
    ways = ways_of(
        opt.words(schedules, "--schedules", schedule_names()),
        opt.words(token_layouts, "--token-layouts", ("contiguous", "zigzag")),
        without_overlap,
    )
    lengths = opt.numbers(tokens or ("8K,16K,32K" if gpu else "1K,2K,4K"), "--tokens")
    chosen = opt.words(kernels, "--kernels", kernel_names())
    _tell(where)
    rows = measuring.measure(where, chosen, lengths, ways, sizes, rounds)
    if _first():
        result = {
            "benchmark": "attention",
            **describe(),
            "device": where[0].device,
            "settings": measuring.settings(sizes, rounds),
            "rows": rows,
        }
        _show(result, [report.table], report.refusals, json, plot, report.plot)


@bench.command()
def collectives(
    sizes: Annotated[
        str | None, typer.Option(help="Bytes, with commas: 1K,4M. Default 1K to 16M; GPUs 256M.")
    ] = None,
    operations: Annotated[
        str | None,
        typer.Option(
            help="message, ring shift, all-gather, reduce-scatter, all-reduce, all-to-all, with "
            "commas; default: all."
        ),
    ] = None,
    ranks: opt.OneRanks = None,
    node_size: opt.NodeSize = None,
    cluster: Annotated[
        str | None,
        typer.Option(help="Whose numbers stand beside: a name in configs/clusters or a YAML file."),
    ] = None,
    save_cluster: Annotated[
        Path | None,
        typer.Option(help="Write that cluster with the links measured here, as YAML."),
    ] = None,
    device: opt.Device = "auto",
    rounds: opt.Rounds = 5,
    json: opt.Json = None,
    plot: opt.Plot = None,
) -> None:
    """Time and bandwidth of messages and collectives over the ranks, and the link they show.

    Also under torchrun, over the ranks that it started, on several nodes: `torchrun ... -m
    megatron_seqpar bench collectives`.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from megatron_seqpar.bench import collectives as measuring
    from megatron_seqpar.bench import collectives_report as report
    from megatron_seqpar.bench.place import places
    from megatron_seqpar.bench.result import describe
    from megatron_seqpar.simulate.topology import CPU_CLUSTER, cluster_for

    _check_files(json, plot)
    _check_files(save_cluster)
    (place,) = places(device, None if ranks is None else (ranks,), node_size)
    if place.ranks < 2:
        raise SeqParError(
            f"--ranks {place.ranks}: one rank sends nothing; use at least 2 (--device cpu measures "
            "processes of this machine)"
        )
    on_cpu = CPU_CLUSTER if place.device == "cpu" else None
    known = cluster_for(cluster or on_cpu, ranks_per_node=place.node_size)
    default = "1K,64K,1M,16M,256M" if place.device == "cuda" else "1K,16K,256K,1M,4M,16M"
    every = opt.numbers(sizes or default, "--sizes", least=4)
    names = ",".join(measuring.OPERATIONS) if operations is None else operations
    wanted = opt.words(names, "--operations", measuring.OPERATIONS)
    _tell([place])
    rows = measuring.measure(place, wanted, every, rounds)
    if not _first():
        return
    result = {
        "benchmark": "collectives",
        **describe(),
        "device": place.device,
        "backend": place.backend,
        "ranks": place.ranks,
        "node_size": place.node_size,
        "settings": {"rounds": rounds, "sizes": list(every), "operations": wanted},
        "cluster": {"name": known.name, "note": known.note},
        "rows": rows,
        "fits": measuring.fits(rows, place, known),
    }
    tables = [report.table, report.fit_table]
    _show(result, tables, report.notes, json, plot, report.plot)
    if save_cluster is not None:
        measuring.save_measured(known, rows, result["command"], save_cluster)
        _console().print(f"{save_cluster}", highlight=False)


@bench.command()
def step(
    model: opt.Model = None,
    layers: Annotated[
        str | None,
        typer.Option(
            help="A number, all, or fit: as many as fit a GPU at the longest length. Default: all "
            "on a CPU, fit on GPUs."
        ),
    ] = None,
    tokens: opt.Tokens = None,
    ranks: opt.OneRanks = None,
    ways: Annotated[
        str | None,
        typer.Option(help="Names of ways, separated by ';', or all. A wrong name lists them."),
    ] = None,
    kernel: opt.Kernel = None,
    chunks: opt.Chunks = 8,
    steps: opt.Steps = 4,
    rounds: opt.Rounds = 1,
    stock_limit_gib: opt.StockLimit = None,
    seconds: opt.Seconds = None,
    script: opt.Script = None,
    data: opt.Data = "stdlib",
    device: opt.Device = "auto",
    work: opt.Work = opt.WORK / "step",
    json: opt.Json = None,
    plot: opt.Plot = None,
) -> None:
    """A training step of one model: stock Megatron against this plugin, every way."""
    from megatron_seqpar.bench import result as results
    from megatron_seqpar.bench import step as measuring
    from megatron_seqpar.bench import step_report as report
    from megatron_seqpar.bench.prepare import prepare, ranks_and_device

    _check_files(json, plot)
    (count,), chosen = ranks_and_device(device, None if ranks is None else (ranks,))
    gpu = chosen == "cuda"
    lengths = opt.numbers(tokens or ("8K,16K,32K,64K,128K" if gpu else "1K,2K"), "--tokens")
    wanted = layers or ("fit" if gpu else "all")
    if wanted == "fit" and not gpu:
        raise SeqParError("--layers fit: needs a GPU, whose memory is the limit; give a number")
    number = 0 if wanted in ("fit", "all") else opt.number(wanted, "--layers")
    names = measuring.defaults(count, chosen)
    by_name = measuring.ways_of(count, chunks, "")
    if ways is not None:
        names = list(by_name) if ways == "all" else opt.words(ways, "--ways", tuple(by_name), ";")
    here = prepare(
        chosen, model, script, data, work, kernel, stock_limit_gib, seconds, _console(error=True)
    )
    by_name = measuring.ways_of(count, chunks, here.kernel)
    changes: dict[str, Any] = {}
    result = here.result("step", ranks=count, chunks=chunks, steps=steps, rounds=rounds)
    if wanted == "fit":
        limit = results.gpu_memory_bytes(here.about)
        if limit is None:
            raise SeqParError("--layers fit: nvidia-smi does not say how much memory a GPU has")
        longest = here.training(lengths[-1], steps, changes)
        found = measuring.fit_layers(here.trainer, by_name, longest, limit)
        changes["num-layers"] = found.layers
        result["layers_tried"] = {str(n): tried for n, tried in sorted(found.tries.items())}
    elif number:
        changes["num-layers"] = number
    trainings = [here.training(length, steps, changes) for length in lengths]
    result["settings"]["layers"] = int(trainings[0].model_flags()["num-layers"])

    def save(rows: list[dict[str, Any]]) -> None:
        if json is not None:  # a run that is cut short leaves what it has
            results.write({**result, "rows": rows}, json)

    picked = [by_name[name] for name in by_name if name in names]
    rows = measuring.measure(here.trainer, picked, trainings, rounds, here.limit_gib, save)
    result["rows"] = rows
    _show(result, [report.table], report.failures, json, plot, report.plot)


@bench.command()
def memory(
    model: opt.Model = "llama3-mini",
    tokens: opt.Tokens = None,
    ranks: opt.Ranks = None,
    ways: Annotated[
        str | None, typer.Option(help="Names of ways, separated by ';'. A wrong name lists them.")
    ] = None,
    kernel: opt.Kernel = None,
    chunks: opt.Chunks = 8,
    accounts: Annotated[
        bool,
        typer.Option(
            "--accounts/--no-accounts",
            help="On a CPU, on the first number of ranks: the allocator's peak, in a run more.",
        ),
    ] = False,
    steps: opt.Steps = 4,
    rounds: opt.Rounds = 1,
    stock_limit_gib: opt.StockLimit = None,
    seconds: opt.Seconds = None,
    script: opt.Script = None,
    data: opt.Data = "stdlib",
    device: opt.Device = "auto",
    work: opt.Work = opt.WORK / "memory",
    json: opt.Json = None,
    plot: opt.Plot = None,
) -> None:
    """Peak memory and step time of every way to spend memory: recomputation and pieces."""
    from megatron_seqpar.bench import memory as measuring
    from megatron_seqpar.bench import memory_report as report
    from megatron_seqpar.bench import result as results
    from megatron_seqpar.bench.prepare import prepare, ranks_and_device
    from megatron_seqpar.bench.step_report import failures

    _check_files(json, plot)
    counts, chosen = ranks_and_device(device, _counts(ranks or "1", "--ranks"))
    gpu = chosen == "cuda"
    lengths = opt.numbers(tokens or ("8K,16K,32K" if gpu else "1K,2K"), "--tokens")
    every = tuple(measuring.ways_of(1, chunks, ""))
    names = every if ways is None else opt.words(ways, "--ways", every, ";")
    here = prepare(
        chosen, model, script, data, work, kernel, stock_limit_gib, seconds, _console(error=True)
    )

    def ways_of(count: int) -> dict[str, Any]:
        made = measuring.ways_of(count, chunks, here.kernel)
        return {name: way for name, way in made.items() if name in names}

    result = here.result("memory", chunks=chunks, steps=steps, rounds=rounds)

    def save(rows: list[dict[str, Any]]) -> None:
        if json is not None:
            results.write({**result, "rows": rows}, json)

    trainings = [here.training(length, steps, {}) for length in lengths]
    result["rows"] = measuring.measure(
        here.trainer, counts, ways_of, trainings, rounds, here.limit_gib, accounts, save
    )
    _show(result, [report.table], failures, json, plot, report.plot)


# ---- what the four share --------------------------------------------------------------------


def _counts(text: str | None, option: str) -> tuple[int, ...] | None:
    return None if text is None else opt.numbers(text, option)


def _check_files(json: Path | None, plot: Path | None = None) -> None:
    """Refuse what cannot be written, or drawn, before anything is measured."""
    if plot is not None:
        if plot.suffix not in _PICTURES:
            raise SeqParError(f"--plot {plot}: name a {', '.join(_PICTURES)} file")
        if importlib.util.find_spec("matplotlib") is None:
            raise SeqParError("--plot: needs matplotlib; pip install 'megatron_seqpar[plot]'")
    for path in (json, plot):
        if path is None:
            continue
        if path.is_dir():
            raise SeqParError(f"{path}: is a folder; name a file")
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise SeqParError(f"{path}: cannot be written: {folder} is no folder to write in")


def _first() -> bool:
    """Whether this process speaks: under torchrun, rank 0 alone."""
    return os.environ.get("RANK", "0") == "0"


def _console(*, error: bool = False) -> Console:
    from rich.console import Console

    terminal = shutil.get_terminal_size().columns if sys.stdout.isatty() else 150
    return Console(width=max(terminal, 110), stderr=error, highlight=False)


def _tell(places: list[Any]) -> None:
    """Where it will run, and what is worth telling of that."""
    if not _first():
        return
    console = _console(error=True)
    for place in places:
        how = "NCCL" if place.device == "cuda" else "gloo, one thread a rank"
        ranks = f"{place.ranks} rank{'s' * (place.ranks > 1)}"
        console.print(f"{ranks} on {place.device} ({how})")
        for note in place.notes:
            console.print(f"note: {note}")


def _show(
    result: dict[str, Any],
    tables: Sequence[Callable[[dict[str, Any]], Any]],
    notes: Callable[[dict[str, Any]], list[str]],
    json: Path | None,
    plot: Path | None,
    draw: Callable[[dict[str, Any], Path], None],
) -> None:
    """Print, write and draw a result."""
    from megatron_seqpar.bench.result import write

    console = _console()
    for table in tables:
        console.print(table(result))
    for line in notes(result):
        console.print(line, markup=False)
    if json is not None:
        write(result, json)
        console.print(f"{json}")
    if plot is not None:
        draw(result, plot)
        console.print(f"{plot}")
