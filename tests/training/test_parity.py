# SPDX-License-Identifier: Apache-2.0
"""Fifty steps of Megatron's own loop on real text: with the axis the same run as without it.

The reference is one process with the axis off and Megatron's own attention. Compared are every
parameter's gradient in the first step, and every step's loss and gradient norm.
"""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from megatron_seqpar.attention import Causal, build_schedule
from megatron_seqpar.data import Corpus
from tests.integration.dump_gradients import compare
from tests.training.runs import Setting, Trained

pytest.importorskip("megatron.training")

LAYOUTS = [
    pytest.param(2, "--sequence-parallel-size 2", id="sp2"),
    pytest.param(3, "--sequence-parallel-size 3", id="sp3"),
    pytest.param(4, "--sequence-parallel-size 4", id="sp4", marks=pytest.mark.slow),
    pytest.param(
        4,
        "--sequence-parallel-size 2 --tensor-model-parallel-size 2 --sequence-parallel",
        id="sp2-tp2-tpsp",
    ),
    pytest.param(4, "--sequence-parallel-size 2 --use-distributed-optimizer", id="sp2-dp2-distopt"),
]


def differences(ours: list[float], reference: list[float]) -> list[float]:
    """Relative difference of each step."""
    return [abs(a - b) / abs(b) for a, b in zip(ours, reference, strict=True)]


def check_same_run(ours: Trained, reference: Trained, learnt: float = 0.2) -> None:
    """Gradients, losses and gradient norms equal to rounding that fifty steps may amplify.

    learnt: the part of the first loss that training must have taken off.
    """
    by_name = compare(ours.gradients, reference.gradients)
    worst = max(by_name, key=by_name.__getitem__)
    assert by_name[worst] < 1e-5, (worst, by_name[worst])
    for ours_each, reference_each in (
        (ours.losses, reference.losses),
        (ours.grad_norms, reference.grad_norms),
    ):
        apart = differences(ours_each, reference_each)
        assert max(apart[:10]) <= 1e-5, apart
        assert max(apart) <= 1e-4, apart
    counted = "floating_point_operations_per_step"  # of the whole sequence, for Megatron's log
    assert ours.report["summary"][counted] == reference.report["summary"][counted] > 0
    assert reference.losses[-1] < (1 - learnt) * reference.losses[0], "nothing was learnt"


@pytest.fixture(scope="module")
def setting(corpus: Corpus, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(corpus, cache, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def reference(setting: Setting) -> Trained:
    return setting.train("one-rank", 1)


@pytest.mark.parametrize(("ranks", "layout"), LAYOUTS)
def test_fifty_steps_are_the_same(
    setting: Setting, reference: Trained, ranks: int, layout: str, request: pytest.FixtureRequest
) -> None:
    name = request.node.callspec.id
    check_same_run(setting.train(name, ranks, *shlex.split(layout)), reference)


def test_fifty_steps_over_pipeline_stages(setting: Setting) -> None:
    """Megatron seeds every pipeline stage apart, so the reference has two stages as well."""
    stages = ("--pipeline-model-parallel-size", "2")
    reference = setting.train("pp2", 2, *stages)
    check_same_run(setting.train("sp2-pp2", 4, "--sequence-parallel-size", "2", *stages), reference)


def test_fifty_steps_with_masked_tokens_on_one_rank(
    corpus: Corpus, cache: Path, tmp_path: Path
) -> None:
    """Half the tokens do not count, and the first rank of two holds nearly all of those."""
    setting = Setting(corpus, cache, tmp_path, mask=0.45)
    check_same_run(
        setting.train("split", 2, "--sequence-parallel-size", "2"), setting.train("one-rank", 1)
    )


def test_a_real_run_sends_what_the_schedule_says(setting: Setting) -> None:
    """Messages and bytes of attention over six steps, two microbatches and two layers each."""
    run = Setting(setting.corpus, setting.cache, setting.folder, steps=6).train(
        "counted", 2, "--sequence-parallel-size", "2"
    )
    plan = build_schedule(
        "auto", size=2, seq_length=384, mask=Causal(), query_heads=4, kv_heads=2, head_dim=16
    )
    calls = 6 * 2 * 2
    assert len(run.report["ranks"]) == 2
    for entry in run.report["ranks"]:
        counted, rank = entry["attention"], entry["sp_rank"]
        both = ("forward", "backward")
        assert counted["bytes"] == calls * sum(plan.bytes_sent(rank, d, "float32") for d in both)
        assert counted["messages"] == calls * sum(plan.messages_sent(rank, d) for d in both)
        tiles = sum(len(step.tiles) for step in plan.steps(rank))
        assert counted["forward_calls"] == counted["backward_calls"] == calls * tiles
