# SPDX-License-Identifier: Apache-2.0
"""Recomputation in Megatron's own loop, where many micro-batches are in flight."""

from __future__ import annotations

import json

import pytest
import torch

from tests.integration.runs import launch, trained

pytest.importorskip("megatron.training")

LAYOUT = (
    *("--sequence-parallel-size", "2", "--pipeline-model-parallel-size", "2"),
    *("--num-layers", "4", "--num-layers-per-virtual-pipeline-stage", "1"),
    *("--global-batch-size", "8", "--hidden-dropout", "0.1", "--train-iters", "2"),
)
COUNTS = ("forward_calls", "backward_calls", "messages", "bytes")


@pytest.mark.slow
def test_interleaved_stages_recompute_to_the_same_bits(tmp_path):
    """Eight micro-batches through two stages of two model chunks, each on two ranks."""
    gradients, counts, losses = [], [], []
    for mode in ("none", "attention-output"):
        dump, report = tmp_path / f"{mode}.pt", tmp_path / f"{mode}.json"
        asked = ["--seqpar-recompute", mode, "--seqpar-report", str(report)]
        if mode != "none":
            asked += ["--seqpar-offload", "stash"]
        run = trained(launch(4, *LAYOUT, *asked, dump=dump))
        assert run.text.count("moves nothing: this run computes on the CPU") == (mode != "none")
        gradients.append(torch.load(dump))
        written = json.loads(report.read_text())
        losses.append([step["loss"] for step in written["steps"]])
        counts.append([{n: rank["attention"][n] for n in COUNTS} for rank in written["ranks"]])
        assert {rank["offload"]["bytes_out"] for rank in written["ranks"]} == {0}
    assert losses[0] == losses[1]
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        assert torch.equal(gradients[1][name], expected), name
    assert counts[0] == counts[1]
    assert all(rank["forward_calls"] > 0 for rank in counts[0])
