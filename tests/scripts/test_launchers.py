# SPDX-License-Identifier: Apache-2.0
"""The scripts that start runs: what their --dry-run prints is what the launcher and Megatron take.

`test_megatron_takes_what_the_scripts_say` hands the printed command lines to the launcher's own
check, in which Megatron's parser and the plugin's refusals judge every flag.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_seqpar.cli import app
from megatron_seqpar.launcher.dry_run import Order, check

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = REPOSITORY / "scripts"
LAUNCHERS = (
    "compare_tp.sh",
    "prepare_data.sh",
    "pretrain_llama.sh",
    "slurm_pretrain.sbatch",
    "torchrun_multinode.sh",
)
MOCK = ("pretrain_llama.sh", "--mock", "--nproc", "8")
SAVING = (
    *("pretrain_llama.sh", "--data", "corpus/a corpus/b", "--tokenizer", "bytes", "--nproc", "8"),
    *("--model", "llama2-7b", "--tp", "2", "--seq-length", "65536", "--save", "ckpt"),
    *("--recompute", "mlp", "--", "--eval-iters", "5"),
)


def bash(script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A script in a shell without the variables of clusters."""
    dropped = ("SLURM", "MASTER_", "NNODES", "NODE_RANK", "NPROC", "CUDA_VISIBLE", "DATA_PATH")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return subprocess.run(
        ["bash", str(SCRIPTS / script), *arguments],
        env={**kept, **variables},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
    )


def words(*command: str, **variables: str) -> list[str]:
    """The command that a script's --dry-run prints."""
    done = bash(command[0], "--dry-run", *command[1:], **variables)
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout)


def run_of(command: list[str]) -> list[str]:
    """What follows `megatron_seqpar run` in a command."""
    at = command.index("megatron_seqpar")
    assert command[at - 1] == "-m"
    assert command[at + 1] == "run"
    return command[at + 2 :]


@pytest.mark.parametrize("script", LAUNCHERS)
def test_help_and_wrong_options(script: str) -> None:
    told = bash(script, "--help")
    assert told.returncode == 0
    assert script in told.stdout or script == "torchrun_multinode.sh"
    assert "--dry-run" in told.stdout
    assert "#SBATCH" not in told.stdout
    wrong = bash(script)
    if script != "compare_tp.sh":
        assert wrong.returncode == 2
        assert wrong.stderr.startswith("error: ")
    for option in ("--nproc", "--output"):
        if f"{option} " in told.stdout:
            done = bash(script, option)
            assert done.returncode == 2
            assert f"{option} needs a value" in done.stderr
    assert os.access(SCRIPTS / script, os.X_OK)


def test_one_node_stands_alone() -> None:
    command = words("torchrun_multinode.sh", "--nproc", "2", "t.py", "--note", "two words")
    assert command[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    assert run_of(command) == ["t.py", "--note", "two words"]


def test_several_nodes_by_arguments_and_by_environment() -> None:
    meeting = [
        "--nnodes=4", "--node-rank=3", "--master-addr=n0", "--master-port=1234",
        "--nproc-per-node=8",
    ]  # fmt: skip
    given = words(
        *("torchrun_multinode.sh", "--nodes", "4", "--node-rank", "3", "--master-addr", "n0"),
        *("--master-port", "1234", "--nproc", "8", "t.py"),
    )
    assert given[3:8] == meeting
    variables = {"NNODES": "4", "NODE_RANK": "3", "MASTER_ADDR": "n0", "MASTER_PORT": "1234"}
    assert words("torchrun_multinode.sh", "t.py", **variables, NPROC_PER_NODE="8") == given
    slurm = {"SLURM_JOB_NUM_NODES": "4", "SLURM_NODEID": "3", "MASTER_ADDR": "n0"}
    told = words("torchrun_multinode.sh", "t.py", **slurm, MASTER_PORT="1234", NPROC_PER_NODE="8")
    assert told == given
    assert words("torchrun_multinode.sh", "t.py", CUDA_VISIBLE_DEVICES="4,5,6")[4].endswith("=3")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes", "2", "--nproc", "1", "t.py"], "--node-rank"),
        (["--nodes", "2", "--node-rank", "2", "--nproc", "1", "t.py"], "use 0 to 1"),
        (["--nodes", "2", "--node-rank", "0", "--nproc", "1", "t.py"], "--master-addr"),
        (["--nodes", "two", "--nproc", "1", "t.py"], "--nodes two: use a whole number"),
        (["--nproc", "0", "t.py"], "--nproc 0: use a whole number"),
    ],
)
def test_what_several_nodes_need(arguments: list[str], message: str) -> None:
    done = bash("torchrun_multinode.sh", "--dry-run", *arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_slurm_starts_one_task_a_node(tmp_path: Path) -> None:
    command = words(
        *("slurm_pretrain.sbatch", "--nodes", "2", "--nproc", "8", "--venv", "/opt/my env"),
        *("--config", "c.yaml", "--data-path", "a b"),
    )
    at = command.index("srun")
    assert command[:at] == ["env", "MASTER_ADDR=FIRST_NODE", "MASTER_PORT=20000", "NNODES=2"]
    assert command[at + 1 : at + 4] == ["--nodes=2", "--ntasks=2", "--ntasks-per-node=1"]
    assert not [word for word in command if word.startswith("--container")]
    # the task itself, run as srun would on the second node, prints what torchrun gets
    assert command[-3:-1] == ["bash", "-c"]
    activate = tmp_path / "bin" / "activate"
    activate.parent.mkdir()
    activate.write_text("", encoding="utf-8")
    task = command[-1].replace("/opt/my\\ env", str(tmp_path)).replace(" -- ", " --dry-run -- ", 1)
    done = subprocess.run(
        ["bash", "-c", task],
        env={"PATH": os.environ["PATH"], "SLURM_NODEID": "1", "MASTER_ADDR": "n0", "NNODES": "2"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = shlex.split(done.stdout)
    assert found[0] == "python"
    assert found[3:6] == ["--nnodes=2", "--node-rank=1", "--master-addr=n0"]
    assert run_of(found) == ["--config", "c.yaml", "--data-path", "a b"]


def test_slurm_with_a_container_and_a_job() -> None:
    command = words(
        *("slurm_pretrain.sbatch", "--container", "image.sqsh", "--mounts", "/data:/data", "t.py"),
        SLURM_JOB_ID="70001", SLURM_JOB_NUM_NODES="3", SLURM_GPUS_ON_NODE="4",
    )  # fmt: skip
    assert "MASTER_PORT=30001" in command
    assert "--nodes=3" in command
    assert "--container-image=image.sqsh" in command
    assert f"--container-mounts={REPOSITORY}:{REPOSITORY},/data:/data" in command
    assert "--nproc 4" in command[-1]
    outside = bash("slurm_pretrain.sbatch", "t.py")
    assert outside.returncode == 2
    assert "this is no SLURM job" in outside.stderr


def test_sbatch_runs_a_copy_of_its_script(tmp_path: Path) -> None:
    """So the repository is the folder it was submitted from, and any other is refused."""
    copied = tmp_path / "slurm_script"
    shutil.copy(SCRIPTS / "slurm_pretrain.sbatch", copied)
    for folder, status in ((REPOSITORY, 0), (tmp_path, 2)):
        done = subprocess.run(
            ["bash", str(copied), "--dry-run", "t.py"],
            env={"PATH": os.environ["PATH"], "SLURM_SUBMIT_DIR": str(folder)},
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == status, done.stderr
    assert "is not the repository's folder" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--data (or DATA_PATH) is missing"),
        (["--data", "x"], "--tokenizer (or TOKENIZER) is missing"),
        (["--mock", "--data", "x"], "give one of them"),
        (["--mock", "--tp", "3"], "--tp 3 x --pp 1 does not divide 8 processes"),
        (["--mock", "--eval-iters", "3"], "--eval-iters: unknown"),
    ],
)
def test_pretraining_says_what_it_lacks(arguments: list[str], message: str) -> None:
    done = bash("pretrain_llama.sh", "--dry-run", "--nproc", "8", *arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_preparing_data() -> None:
    command = words("prepare_data.sh", "--input", "a b.jsonl", "--output", "data/x", "--fresh")
    given = ["prepare-data", "--output-prefix", "data/x", "--input", "a b.jsonl", "--fresh"]
    assert command[1:] == ["-m", "megatron_seqpar", *given]
    told = CliRunner().invoke(app, ["prepare-data", "--help"], env={"COLUMNS": "200"})
    command = words(
        *("prepare_data.sh", "--key", "k", "--output", "o", "--tokenizer", "t", "--input", "i"),
    )
    for option in (word for word in command if word.startswith("--")):
        assert option in told.output, option


def test_comparing_tp(tmp_path: Path) -> None:
    """The file that it writes is a comparison, over nodes as well."""
    shared = ("--nproc", "2", "--seq-length", "1024,2048", "--device", "cpu", "--model", "compare")
    alone = bash("compare_tp.sh", "--dry-run", *shared)
    assert alone.returncode == 0, alone.stderr
    ways = [line for line in alone.stdout.splitlines() if line.startswith("# 1,024 tokens")]
    assert [way.split(", ", 1)[1] for way in ways] == [
        "SP=2", "TP=2", "TP=2 + TP-SP", "TP=2 + TP-SP, stock",
    ]  # fmt: skip
    assert "--use-distributed-optimizer" in alone.stdout
    nodes = bash("compare_tp.sh", "--dry-run", "--nodes", "2", "--srun", "srun -p gpu", *shared)
    assert nodes.returncode == 0, nodes.stderr
    lines = [line for line in nodes.stdout.splitlines() if "megatron_seqpar run" in line]
    assert len(lines) == 12, "six ways at two lengths"
    command = shlex.split(lines[0])
    assert command[:3] == ["srun", "-p", "gpu"]
    assert {"--nodes=2", "--ntasks-per-node=1"} <= set(command)
    assert command[command.index("--nproc") + 1] == "2"
    assert "--rdzv-endpoint FIRST_NODE:20000" in command[command.index("--torchrun-args") + 1]


def test_megatron_takes_what_the_scripts_say() -> None:
    """Every flag exists, and goes together with the others, on eight GPUs."""
    orders = []
    for command in (MOCK, SAVING):
        found = run_of(words(*command))
        assert found[:2] == ["--device", "cuda"]
        plain = CliRunner().invoke(app, ["run", "--dry-run", "--no-check", "--nproc", "8", *found])
        assert plain.exit_code == 0, plain.output
        script, *arguments = run_of(shlex.split(plain.stdout, comments=True))[1:]
        assert script == str(SCRIPTS / "pretrain_gpt.py")
        orders.append(Order(script, tuple(arguments), 8, 8))
    mock, saving = check(orders, "cuda")
    assert (mock.error, saving.error) == (None, None)
    assert mock.resolved["sequence_parallel_size"] == 8
    assert mock.resolved["num_layers"] == 32
    assert mock.resolved["params_dtype"] == "torch.bfloat16"
    assert saving.resolved["sequence_parallel_size"] == 4
    assert saving.resolved["data_path"] == "['corpus/a', 'corpus/b']"
    assert saving.resolved["eval_iters"] == 5, "what follows -- wins"
    assert any("corpus/a: there is no" in note for note in saving.notes)
