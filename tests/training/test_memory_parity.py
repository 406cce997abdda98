# SPDX-License-Identifier: Apache-2.0
"""Fifty steps with everything on that saves memory: the same run as with everything off.

The reference is one process without the axis, with Megatron's own attention, MLP and loss. Five
and seven pieces divide neither the 192 tokens of a rank nor each other.
"""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from megatron_seqpar.data import Corpus
from tests.training.runs import Setting, Trained
from tests.training.test_parity import check_same_run

pytest.importorskip("megatron.training")

EVERYTHING = (
    "--seqpar-recompute attention-output --seqpar-mlp-chunks 5 --seqpar-loss-chunks 7 "
    "--seqpar-offload stash"
)
AXIS = "--sequence-parallel-size 2"
TENSOR = "--tensor-model-parallel-size 2 --sequence-parallel"


@pytest.fixture(scope="module")
def setting(corpus: Corpus, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(corpus, cache, tmp_path_factory.mktemp("memory"))


@pytest.fixture(scope="module")
def reference(setting: Setting) -> Trained:
    return setting.train("off", 1)


@pytest.mark.parametrize(
    ("ranks", "arguments"),
    [
        pytest.param(2, f"{AXIS} {EVERYTHING}", id="sp2"),
        pytest.param(1, EVERYTHING, id="sp1", marks=pytest.mark.slow),
        pytest.param(4, f"{AXIS} {TENSOR} {EVERYTHING}", id="sp2-tp2", marks=pytest.mark.slow),
        pytest.param(
            4,
            f"{AXIS} {EVERYTHING} --use-distributed-optimizer --overlap-grad-reduce",
            id="sp2-dp2",
            marks=pytest.mark.slow,
        ),
        *(
            pytest.param(
                2,
                f"{AXIS} --seqpar-recompute {mode} --seqpar-loss-chunks 7",
                id=f"sp2-{mode}",
                marks=pytest.mark.slow,
            )
            for mode in ("mlp", "attention-qkv")
        ),
    ],
)
def test_fifty_steps_are_the_same(
    setting: Setting,
    reference: Trained,
    ranks: int,
    arguments: str,
    request: pytest.FixtureRequest,
) -> None:
    name = request.node.callspec.id
    ours = setting.train(name, ranks, *shlex.split(arguments))
    check_same_run(ours, reference)
    for entry in ours.report["ranks"]:
        counted = entry["attention"]
        if ranks == 1:  # counted by the axis, which one rank has none of
            assert counted is None
            continue
        assert counted["forward_calls"] == counted["backward_calls"] > 0, "attention ran again"
        assert entry["offload"]["bytes_out"] == 0, "on a CPU nothing is moved"


@pytest.mark.slow
def test_tied_weights_with_everything_on(corpus: Corpus, cache: Path, tmp_path: Path) -> None:
    """The weight of embedding and head gets its gradient from both, once."""
    shape = Setting(corpus, cache, tmp_path, steps=10)
    tied = [flag for flag in shape.model if flag != "--untie-embeddings-and-output-weights"]
    setting = Setting(corpus, cache, tmp_path, steps=10, model=tuple(tied))
    ours = setting.train("on", 2, *shlex.split(f"{AXIS} {EVERYTHING}"))
    check_same_run(ours, setting.train("off", 1), learnt=0.05)
