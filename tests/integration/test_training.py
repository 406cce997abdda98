# SPDX-License-Identifier: Apache-2.0
"""Megatron's own training loop with and without the axis, through the launcher, on gloo.

Each comparison is of parameter gradients: a loss hides a gradient that is off by a factor.
"""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch

from tests.integration.dump_gradients import compare
from tests.integration.runs import MODEL, Run, launch, trained
from tests.support.releases import CHECKOUT, HYBRID_SCRIPT, hybrid_pattern, needs_checkout

pytest.importorskip("megatron.training")

SP2 = ("--sequence-parallel-size", "2")
MOE = shlex.split(
    "--num-experts 4 --moe-router-topk 2 --moe-aux-loss-coeff 1e-2 --moe-z-loss-coeff 1e-3 "
    "--moe-token-dispatcher-type alltoall"
)


def same(ours: Run, reference: Run, gradients: Path, reference_gradients: Path) -> None:
    """Equal to rounding: every gradient of the first step, and every loss."""
    differences = compare(torch.load(gradients), torch.load(reference_gradients))
    worst = max(differences, key=differences.__getitem__)
    assert differences[worst] < 5e-6, (worst, differences[worst])
    assert ours.losses == pytest.approx(reference.losses, rel=1e-5)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    """(run, its gradients) of one process with the plugin installed and the axis off."""
    dump = tmp_path_factory.mktemp("one_rank") / "gradients.pt"
    return trained(launch(1, dump=dump)), dump


@pytest.mark.parametrize(
    ("processes", "arguments"),
    [
        pytest.param(2, SP2, id="sp2", marks=pytest.mark.slow),
        pytest.param(
            4,
            (*SP2, "--use-distributed-optimizer", "--overlap-grad-reduce"),
            id="sp2-dp2-distributed-optimizer",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            3,
            ("--sequence-parallel-size", "3", "--seqpar-recompute", "attention-output"),
            id="sp3-recompute",
        ),
    ],
)
def test_axis_trains_like_one_rank(tmp_path, one_rank, processes, arguments):
    dump = tmp_path / "gradients.pt"
    same(trained(launch(processes, *arguments, dump=dump)), one_rank[0], dump, one_rank[1])


def both(tmp_path, *arguments: str, processes: int = 1, **options) -> None:
    """Train without the axis and with it, otherwise alike, and compare."""
    alone, split = tmp_path / "alone.pt", tmp_path / "split.pt"
    reference = trained(launch(processes, *arguments, dump=alone, **options))
    ours = trained(launch(2 * processes, *SP2, *arguments, dump=split, **options))
    same(ours, reference, split, alone)
    hybrid = "local_hybrid_spec" in arguments
    for run, ranks in ((reference, processes), (ours, 2 * processes)):
        assert run.text.count(f"run of 3 steps on {ranks} ranks") == 1
        assert ("-pattern *-*-: layers of hybrid models are not counted" in run.text) == hybrid


def test_masked_tokens_gathered_on_one_rank(tmp_path):
    evaluation = ("--eval-iters", "1", "--eval-interval", "3", "--split", "80,20,0")
    both(tmp_path, *evaluation, mask=0.5)


@pytest.mark.slow
def test_share_of_odd_length(tmp_path):
    """Stock context parallelism wants two chunks a rank; the axis does not."""
    both(tmp_path, "--seq-length", "94")


@pytest.mark.slow
def test_mixture_of_experts_and_multi_token_prediction(tmp_path):
    both(tmp_path, *MOE, "--mtp-num-layers", "1", "--calculate-per-token-loss")


@pytest.mark.slow
def test_latent_attention(tmp_path):
    at = MODEL.index("--group-query-attention")
    latent = (
        "--multi-latent-attention --q-lora-rank 32 --kv-lora-rank 16 --qk-head-dim 16 "
        "--qk-pos-emb-head-dim 8 --v-head-dim 12 --rope-type yarn --seqpar-kernel cpu"
    )
    both(tmp_path, *latent.split(), model=MODEL[:at] + MODEL[at + 3 :])


@pytest.mark.slow
@needs_checkout
def test_hybrid_model(tmp_path):
    at = MODEL.index("--num-layers")
    model = MODEL[:at] + MODEL[at + 2 :]
    spec = ("--spec", "local_hybrid_spec", "hybrid_stack_spec", *hybrid_pattern("*-*-"))
    both(tmp_path, *spec, model=model, script=CHECKOUT / HYBRID_SCRIPT)


@pytest.mark.slow
@needs_checkout
def test_the_stock_script_trains_like_stock_megatron(tmp_path):
    """Megatron's own script, unmodified: without the plugin on one rank, with the axis on two."""
    alone, split = tmp_path / "alone.pt", tmp_path / "split.pt"
    script = CHECKOUT / "pretrain_gpt.py"
    reference = trained(launch(1, script=script, dump=alone, plugin=False))
    ours = trained(launch(2, *SP2, script=script, dump=split))
    same(ours, reference, split, alone)


def test_checkpoints_go_through_stock_megatron_and_back(tmp_path, one_rank):
    """Two iterations each: SP=2, SP=1, Megatron without the plugin, SP=2 with checkpoint args."""
    folder = str(tmp_path / "checkpoint")
    keep = ("--save", folder, "--load", folder, "--ckpt-format", "torch_dist")
    keep += ("--save-interval", "1000", "--override-opt_param-scheduler")
    straight = trained(launch(1, "--train-iters", "8"))
    parts = [
        launch(2, *SP2, *keep, "--train-iters", "2"),
        launch(1, *keep, "--train-iters", "4"),
        launch(1, *keep, "--train-iters", "6", plugin=False),
        launch(2, *SP2, *keep, "--train-iters", "8", "--use-checkpoint-args"),
    ]
    losses = {}
    for part in parts:
        losses.update(trained(part).losses)
    assert set(losses) == set(straight.losses)
    for iteration in (1, 3, 5, 7):
        # The other printed losses are means over the two iterations of a run.
        assert losses[iteration] == pytest.approx(straight.losses[iteration], rel=1e-5)


@pytest.mark.parametrize(
    ("processes", "arguments", "text"),
    [
        pytest.param(
            *(2, (*SP2, "--attention-dropout", "0.1"), "--attention-dropout 0.1 with"),
            marks=pytest.mark.slow,
        ),
        (2, (*SP2, "--seq-length", "95"), "nearest lengths that work: 94 or 96"),
        (2, ("--sequence-parallel-size", "3"), "multiple of 3 processes, but 2 were started"),
        pytest.param(
            2,
            (*SP2, "--seqpar-schedule", "balanced", "--window-size", "20,0"),
            "--seqpar-schedule balanced, --seqpar-token-layout contiguous with",
            marks=pytest.mark.slow,
        ),
        (1, ("--seqpar-kernel", "cpu", "--seqpar-softcap", "30"), "--seqpar-softcap 30.0: kernel="),
    ],
)
def test_bad_input_ends_with_one_clear_error(processes, arguments, text):
    run = launch(processes, *arguments)
    assert run.status != 0
    assert text in run.text
    assert "Traceback" not in run.text
