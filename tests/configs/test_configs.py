# SPDX-License-Identifier: Apache-2.0
"""Every file of configs/ is read by what it is for, and every run by the launcher's own check."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from megatron_seqpar.cli import app
from megatron_seqpar.commands.plan import _ranks
from megatron_seqpar.commands.run_plan import plan_of_file, planned_layout
from megatron_seqpar.compare.config import CompareConfig
from megatron_seqpar.compare.run import jobs_of_file as compared
from megatron_seqpar.errors import ClusterError, SeqParError
from megatron_seqpar.experiments.run_file import RunConfig, kind_of, read_run
from megatron_seqpar.experiments.setting import read_setting
from megatron_seqpar.launcher.dry_run import Checked, Order, check
from megatron_seqpar.mfu import model_from_flags, read_flags
from megatron_seqpar.planner.constants_file import planner_clusters, read_planner_cluster
from megatron_seqpar.planner.estimate import estimate
from megatron_seqpar.shipped import model_names, run_file, run_names
from megatron_seqpar.simulate import cluster_names, load_cluster, split_nodes
from megatron_seqpar.sweep.run import jobs_of_file as swept
from megatron_seqpar.sweep.space import Space

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RUNS = {path.stem: path for path in sorted((CONFIGS / "runs").glob("*.yaml"))}
PRETRAIN = [name for name, path in RUNS.items() if kind_of(path) == "pretrain"]
ON_GPUS = [name for name in PRETRAIN if read_run(RUNS[name]).device == "cuda"]
OTHERS = [name for name in RUNS if name not in PRETRAIN]
MARGIN = 8 * 2**30
"""Bytes that a run leaves of its GPUs, by the planner: its constants of newer GPUs are assumed."""

MODELS = {
    "llama2-7b", "llama2-7b-gqa", "llama2-33-heads", "llama3-8b", "llama3-70b", "qwen2.5-7b",
    "qwen3-8b", "mixtral-8x7b", "mistral-7b", "gemma2-9b", "quickstart",
}  # fmt: skip
CLUSTERS = {
    "dgx-a100", "dgx-a100-100g", "dgx-h100", "dgx-h200", "dgx-b200", "pcie-box", "laptop",
}  # fmt: skip


def test_what_must_be_there_is() -> None:
    assert set(model_names()) >= MODELS
    assert set(cluster_names()) >= CLUSTERS
    assert set(run_names()) == set(RUNS)
    kinds = [kind_of(path) for path in RUNS.values()]
    assert {kind: kinds.count(kind) >= least for kind, least in
            (("pretrain", 4), ("compare", 2), ("sweep", 1))} == {
        "pretrain": True, "compare": True, "sweep": True,
    }  # fmt: skip
    for name, path in RUNS.items():
        assert name.startswith(kind_of(path) + "-"), "the name says what it is for"


@pytest.mark.parametrize("name", model_names())
def test_models(name: str) -> None:
    flags = read_flags(CONFIGS / "models" / f"{name}.yaml")
    model = model_from_flags({"vocab-size": 256, **flags}, name)
    assert model.parameters > 0


@pytest.mark.parametrize("name", cluster_names())
@pytest.mark.parametrize("nodes", [1, 128])
def test_clusters(name: str, nodes: int) -> None:
    found = load_cluster(CONFIGS / "clusters" / f"{name}-x{nodes}.yaml")
    assert found == replace(load_cluster(name), nodes=nodes)


@pytest.mark.parametrize("name", planner_clusters())
def test_clusters_of_the_planner(name: str) -> None:
    found = read_planner_cluster(CONFIGS / "planner" / f"{name}.yaml")
    assert found.capacity.value > 30 * 2**30
    four = read_planner_cluster(f"{name}-x4")
    assert _ranks(four, None, None) == 4 * four.node_size
    assert _ranks(four, 2, None) == 2 * four.node_size
    with pytest.raises(ClusterError, match=r"--nodes 5: .*4 nodes of 8 ranks, 32 in all"):
        _ranks(four, 5, None)
    assert replace(four, machine=replace(four.machine, nodes=None)) == found


def test_the_issues_way_to_name_a_cluster() -> None:
    found = read_planner_cluster("configs/clusters/dgx-h100-x4.yaml")
    assert (found.name, found.machine.nodes) == ("dgx-h100", 4)


@pytest.mark.parametrize("name", OTHERS)
def test_comparisons_and_sweeps_are_read_and_shown(name: str) -> None:
    kind: Any = Space if kind_of(RUNS[name]) == "sweep" else CompareConfig
    assert read_setting(kind, RUNS[name]).model.is_file()
    done = CliRunner().invoke(app, ["run", "--config", name, "--dry-run", "--no-check"])
    assert done.exit_code == 0, done.output
    commands = [line for line in done.stdout.splitlines() if not line.startswith("#")]
    assert len(commands) >= 2
    assert all("megatron_seqpar run" in line for line in commands)
    started = CliRunner().invoke(app, ["run", "--config", name])
    assert isinstance(started.exception, SeqParError)
    assert f"megatron-seqpar {kind_of(RUNS[name])}" in str(started.exception)


WRONG = {
    ("--sequence-paralel-size", "3"): "did you mean --sequence-parallel-size?",
    ("--lr-warmup-iters", "10"): "--lr-warmup-iters 10: the learning rate is still rising",
    ("--attention-dropout", "0.1"): "Set --attention-dropout 0",
    ("--tensor-model-parallel-size", "4"): "needs a multiple of 8 processes, but 2 were started",
}


@pytest.fixture(scope="module")
def on_cpu() -> dict[str, Checked]:
    """Every way of comparisons and sweeps, and runs that must be refused, in one process."""
    orders = {}
    for name in OTHERS:
        found = swept(RUNS[name]) if kind_of(RUNS[name]) == "sweep" else compared(RUNS[name])
        for label, job in found:
            if not isinstance(job, str) and job.device == "cpu":
                each = job.launch.ranks_per_node or job.ranks
                order = Order(str(job.script), job.arguments, job.ranks, each)
                orders[f"{name}: {label}"] = order
    plan = plan_of_file(RUNS["pretrain-quickstart"], None, None, dry_run=True)
    for words in WRONG:
        orders[words[0]] = Order(plan.script, (*plan.arguments, *words), 2, 2)
    return dict(zip(orders, check(list(orders.values()), "cpu"), strict=True))


def test_megatron_takes_every_way_of_comparisons_and_sweeps(on_cpu: dict[str, Checked]) -> None:
    ways = {label: one for label, one in on_cpu.items() if not label.startswith("--")}
    assert {label: one.error for label, one in ways.items() if one.error is not None} == {}
    assert len(ways) > 40


@pytest.mark.parametrize("words", WRONG)
def test_what_megatron_or_the_plugin_refuses_is_refused(
    words: tuple[str, str], on_cpu: dict[str, Checked]
) -> None:
    """Without a rank, with the words of the run itself."""
    found = on_cpu[words[0]].error
    assert found is not None
    assert WRONG[words] in found


@pytest.fixture(scope="module")
def checked() -> dict[str, Checked]:
    """Every run for GPUs, checked as on its nodes, in one process."""
    orders = []
    for name in ON_GPUS:
        plan = plan_of_file(RUNS[name], None, None, dry_run=True)
        assert plan.nodes is not None
        assert plan.nproc is not None
        ranks = plan.nodes * plan.nproc
        orders.append(Order(plan.script, tuple(plan.arguments), ranks, plan.nproc))
    return dict(zip(ON_GPUS, check(orders, "cuda"), strict=True))


@pytest.mark.parametrize("name", ON_GPUS)
def test_megatron_takes_every_pretraining_run(name: str, checked: dict[str, Checked]) -> None:
    found, run = checked[name], read_run(RUNS[name])
    assert found.error is None
    values = found.resolved
    assert values["world_size"] == run.nodes * run.nproc_per_node
    assert values["sequence_parallel_size"] == values["context_parallel_size"] == run.layout.sp
    layout = run.laid_out(values["world_size"])
    assert values.get("data_parallel_size", 1) == layout.dp
    assert values["seq_length"] == run.seq_length
    assert values["params_dtype"] == "torch.bfloat16"
    assert any(line.startswith("seqpar: attention schedule") for line in found.said)
    assert any("there is no data/text_document.idx" in note for note in found.notes)


@pytest.mark.parametrize("name", ON_GPUS)
def test_every_pretraining_run_fits_its_cluster(name: str) -> None:
    run = read_run(RUNS[name])
    assert run.cluster is not None
    base, nodes = split_nodes(run.cluster)
    assert (nodes or 1) == run.nodes
    cluster = read_planner_cluster(base)
    assert run.nproc_per_node == cluster.node_size
    layout, _ = planned_layout(run, run.nodes * run.nproc_per_node)
    found = estimate(run.sizes(256), cluster, layout)
    assert found.margin >= MARGIN
    assert found.mfu > 0.3


def test_the_quickstarts_run_from_the_command_line(tmp_path: Path) -> None:
    """The whole way: a name, what Megatron makes of it, a command that can be pasted."""
    done = CliRunner().invoke(
        app,
        ["run", "--config", "pretrain-quickstart", "--dry-run", "--train-iters", "4"],
    )
    assert done.exit_code == 0, done.output
    command = shlex.split(done.stdout, comments=True)
    assert command[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    assert command[-2:] == ["--train-iters", "4"]
    assert "# checked: 2 ranks, TP=1 SP=2 PP=1 DP=1; 1 sequence of 4,096 tokens a step" in (
        done.stdout
    )
    assert "#     train_iters = 4" in done.stdout, "the command line wins over the file"
    assert "there is no" not in done.stdout, "the corpus is made before it starts"


def write(folder: Path, text: str) -> Path:
    path = folder / "pretrain-x.yaml"
    path.write_text(text, encoding="utf-8")
    return path


GOOD = (
    "model: llama3-8b\nnproc-per-node: 8\nseq-length: 8192\nglobal-batch-size: 8\n"
    "train-iters: 5\ndata: mock\n"
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("nproc-per-node: 0", "nproc-per-node: 0"),
        ("data: text", "data.name: 'text'"),
        ("data: {path: x}", "data.corpus.tokenizer-type: missing"),
        ("layout: {sp: 2, cp: 2}", "layout.cp: unknown key"),
        ("layout: {zero: 3}", "FSDP does not go with the axis"),
        ("layout: {recompute: some}", "the accepted values are none"),
        ("model: llama9", "model: llama9: no such file"),
        ("speed: 3", "speed: unknown key"),
    ],
)
def test_wrong_files_name_the_key(tmp_path: Path, change: str, message: str) -> None:
    key = change.partition(":")[0]
    kept = [line for line in GOOD.splitlines() if not line.startswith(key + ":")]
    with pytest.raises(SeqParError) as raised:
        read_run(write(tmp_path, "\n".join([*kept, change])))
    assert "pretrain-x.yaml" in str(raised.value)
    assert message in str(raised.value)


def test_a_layout_that_the_ranks_do_not_allow(tmp_path: Path) -> None:
    run = read_run(write(tmp_path, GOOD + "layout: {sp: 3}\n"))
    with pytest.raises(SeqParError, match=r"layout of 8 ranks: .* = 3 does not divide 8 ranks"):
        run.script_arguments(8, [])


def test_flags_and_their_order(tmp_path: Path) -> None:
    """The model's, the layout's, sizes and data, then what the file adds: the last wins."""
    run: RunConfig = read_run(
        write(
            tmp_path,
            GOOD + "layout: {sp: 4, mlp-chunks: off, schedule: ring}\ncluster: dgx-h100\n"
            "arguments: {rotary-base: 7, bf16: true, no-rope-fusion: false}\n",
        )
    )
    found = run.script_arguments(8, ["--mock-data"])
    assert found.index("--rotary-base") < found.index("--sequence-parallel-size")
    assert found[-3:] == ["--rotary-base", "7", "--bf16"]
    assert found[found.index("--seqpar-schedule") + 1] == "ring"
    assert found[found.index("--seqpar-cluster") + 1] == "dgx-h100"
    assert "--seqpar-mlp-chunks" not in found
    assert found[found.index("--max-position-embeddings") + 1] == "8192"


def test_several_nodes_meet(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD + "nodes: 2\nlayout: {sp: 8}\n")
    plan = plan_of_file(path, None, None, dry_run=True)
    assert plan.meeting(1, "n0", 29500, placeholders=False) == [
        "--nnodes=2", "--node-rank=1", "--master-addr=n0", "--master-port=29500",
    ]  # fmt: skip
    assert plan.meeting(None, None, 1, placeholders=True)[1:3] == [
        "--node-rank=NODE_RANK", "--master-addr=MASTER_ADDR",
    ]  # fmt: skip
    with pytest.raises(SeqParError, match="--node-rank and --master-addr is needed on each of 2"):
        plan.meeting(None, None, 29500, placeholders=False)
    with pytest.raises(SeqParError, match="--node-rank 2 with --nodes 2: use 0 to 1"):
        plan.meeting(2, "n0", 29500, placeholders=False)
    alone = plan_of_file(path, 1, None, dry_run=True)
    assert alone.meeting(None, None, 29500, placeholders=False) == []


def test_runs_by_name_and_by_path(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    assert run_file(path) == path
    assert run_file("pretrain-quickstart") == RUNS["pretrain-quickstart"]
    with pytest.raises(SeqParError, match=r"--config nothing: no such file.*pretrain-quickstart"):
        run_file("nothing")
