# SPDX-License-Identifier: Apache-2.0
"""Megatron's own training loop on the CPU runtime, without the plugin."""

import re
from pathlib import Path

import pytest

from tests.cpu_runtime.training import Run, train
from tests.support.releases import (
    CHECKOUT,
    HYBRID_SCRIPT,
    HYBRID_SPEC,
    hybrid_pattern,
    needs_checkout,
)


@pytest.fixture(scope="module")
def one_rank() -> Run:
    return train(1)


def assert_same_losses(run: Run, reference: Run, relative: float = 1e-6) -> None:
    assert sorted(run.losses) == sorted(reference.losses)
    for step, loss in reference.losses.items():
        assert run.losses[step] == pytest.approx(loss, rel=relative), step


def test_one_rank_learns_and_says_what_it_added(one_rank: Run) -> None:
    assert sorted(one_rank.losses) == [1, 2, 3, 4]
    assert one_rank.losses[4] < one_rank.losses[1]
    assert one_rank.stdout.count("--transformer-impl local (Transformer Engine needs CUDA)") == 1
    assert "resident memory" in one_rank.stdout


def test_data_parallel_distributed_optimizer_and_checkpoint(one_rank: Run, tmp_path: Path) -> None:
    """Two ranks save at step 2, one rank goes on: the losses of one rank throughout.

    Saving starts writer processes, which must have the runtime too.
    """
    shared = ("--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable")
    shared += ("--ckpt-format", "torch_dist")
    two = train(2, *shared, "--save", str(tmp_path), "--save-interval", "2")
    assert_same_losses(two, one_rank)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("2")
    resumed = train(1, *shared, "--load", str(tmp_path))
    assert sorted(resumed.losses) == [3, 4]
    assert resumed.losses[3] == pytest.approx(one_rank.losses[3], rel=1e-6)


@pytest.mark.parametrize(
    "tp_sp",
    [
        pytest.param((), id="tp", marks=pytest.mark.slow),
        pytest.param(("--sequence-parallel",), id="tp-sp"),
    ],
)
def test_replicated_parameters_stay_equal_with_dropout(tp_sp: tuple[str, ...]) -> None:
    """Without `dataloader_seed` dropout differs over TP; without the norm's mark TP-SP's gradients.

    Neither raises: the copies of a parameter drift apart.
    """
    script = Path(__file__).with_name("compare_replicas.py")
    arguments = ("--tensor-model-parallel-size", "2", "--hidden-dropout", "0.1")
    run = train(2, *arguments, *tp_sp, script=script)
    found = re.search(r"REPLICAS compared (\d+) largest difference (\S+)", run.stdout)
    assert found is not None
    assert int(found[1]) == 5  # two norms a layer and the last one
    assert float(found[2]) == 0.0


@needs_checkout
def test_stock_script_bf16_and_pipeline() -> None:
    script = CHECKOUT / "pretrain_gpt.py"
    run = train(2, "--pipeline-model-parallel-size", "2", "--bf16", script=script)
    assert run.losses[4] < run.losses[1]


@needs_checkout
def test_stock_hybrid_script_gives_the_losses_of_the_same_gpt(one_rank: Run) -> None:
    pattern = ("--num-layers", "4", *hybrid_pattern("*-*-"))
    run = train(1, *pattern, "--spec", *HYBRID_SPEC, script=CHECKOUT / HYBRID_SCRIPT)
    assert_same_losses(run, one_rank)
