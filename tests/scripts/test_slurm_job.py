# SPDX-License-Identifier: Apache-2.0
"""The SLURM job script for real, with SLURM's commands stood in for: two nodes of this machine.

`srun` starts the tasks as SLURM would, each with its number, and `scontrol` names the nodes. All
from there on is what a job does: torchrun on each node, the meeting, Megatron's training.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
RUN = """
model: quickstart
nodes: 2
nproc-per-node: 1
device: cpu
layout: {sp: 2}
seq-length: 256
global-batch-size: 1
train-iters: 2
data: mock
arguments: {lr: 1.0e-3, eval-iters: 0, eval-interval: 1000, log-interval: 1}
"""
SRUN = """#!/usr/bin/env bash
nodes=0
while [[ "$1" == --* ]]; do
    [[ "$1" != --nodes=* ]] || nodes="${1#--nodes=}"
    shift
done
tasks=()
for ((node = 0; node < nodes; node++)); do
    SLURM_NODEID="$node" SLURM_JOB_NUM_NODES="$nodes" "$@" &
    tasks+=($!)
done
status=0
for task in "${tasks[@]}"; do wait "$task" || status=$?; done
exit "$status"
"""
SCONTROL = """#!/usr/bin/env bash
[[ "$*" == "show hostnames nodes[0-1]" ]] && printf '127.0.0.1\\n127.0.0.2\\n'
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.slow
def test_a_job_of_two_nodes_trains(tmp_path: Path) -> None:
    pytest.importorskip("megatron.training")
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tools / name).write_text(text, encoding="utf-8")
        (tools / name).chmod(0o755)
    config = tmp_path / "pretrain-two.yaml"
    config.write_text(RUN, encoding="utf-8")
    report = tmp_path / "report.json"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    done = subprocess.run(
        ["bash", "scripts/slurm_pretrain.sbatch", "--config", str(config),
         "--seqpar-report", str(report)],
        cwd=REPOSITORY,
        env={
            **kept,
            "PATH": f"{tools}:{os.environ['PATH']}",
            "SEQPAR_PYTHON": sys.executable,
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "nodes[0-1]",
            "SLURM_GPUS_ON_NODE": "1",
            "SLURM_SUBMIT_DIR": str(REPOSITORY),
            "MASTER_PORT": str(free_port()),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "seqpar: linear layers are Megatron's" in done.stdout
    content = json.loads(report.read_text())
    assert len(content["steps"]) == 2
    assert content["parallel"]["world"] == content["parallel"]["sequence"] == 2
