# SPDX-License-Identifier: Apache-2.0
"""Fifty steps with every kind of attention that Megatron's flags and ours can ask for.

The reference is one process without the axis: Megatron's own local attention where it can do the
same, and textbook attention (`tests/integration/plain_attention.py`) where it cannot. Between them
the cases also train with every schedule.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from megatron_seqpar.data import Corpus
from tests.training.runs import MODEL, Setting, Trained
from tests.training.test_parity import check_same_run, differences

pytest.importorskip("megatron.training")

LENGTH = 192
AT = MODEL.index("--group-query-attention")
LATENT_MODEL = (
    *MODEL[:AT],
    *MODEL[AT + 3 :],
    *shlex.split(
        "--multi-latent-attention --q-lora-rank 32 --kv-lora-rank 16 --qk-head-dim 16 "
        "--qk-pos-emb-head-dim 8 --v-head-dim 12 --rope-type rope"
    ),
)


class Reference(NamedTuple):
    """One process (or `ranks`, with TP) that others are compared with.

    options: Megatron's flags, for both. plain: options of textbook attention; None for stock's.
    differs: whether the attention is another than causal softmax, which the losses must show.
    """

    options: str = ""
    ranks: int = 1
    plain: dict[str, Any] | None = None
    latent: bool = False
    differs: bool = True


WINDOW = "--window-size 40,0 --window-attn-skip-freq 2"
LEARNABLE = f"--softmax-type learnable {WINDOW}"
REFERENCES = {
    "causal": Reference(differs=False),
    "window": Reference(WINDOW),
    "window-ahead": Reference("--window-size 24,8"),
    "off-by-one": Reference("--softmax-type off-by-one"),
    "learnable": Reference(LEARNABLE),
    "learnable-tp2": Reference(
        f"{LEARNABLE} --tensor-model-parallel-size 2 --sequence-parallel", 2
    ),
    "deterministic": Reference("--micro-batch-size 2 --deterministic-mode", differs=False),
    "prefix": Reference(plain={"prefix": 50}),
    "sink-tokens": Reference(plain={"window": [30, 0], "sinks": 4}),
    "softcap": Reference(plain={"softcap": 0.05}),
    "latent": Reference(plain={}, latent=True, differs=False),
    "latent-batch": Reference("--micro-batch-size 2", plain={}, latent=True, differs=False),
}

CASES = [
    ("window", 2, ""),
    ("learnable", 2, "--seqpar-schedule allgather"),
    ("causal", 2, "--seqpar-token-layout zigzag"),
]
MORE_CASES = [
    ("prefix", 2, "--seqpar-mask prefix:50"),
    ("latent", 3, ""),
    ("window", 3, "--seqpar-schedule ring"),
    ("window", 2, "--seqpar-schedule zigzag --seqpar-token-layout zigzag"),
    ("window-ahead", 3, "--seqpar-schedule ulysses"),
    ("off-by-one", 2, ""),
    ("learnable", 3, "--seqpar-schedule solver --seqpar-recompute attention-output"),
    ("learnable-tp2", 4, "--seqpar-schedule zigzag"),
    ("deterministic", 2, "--seqpar-kernel cpu"),
    ("sink-tokens", 3, "--seqpar-mask window:30,0,4 --seqpar-schedule solver"),
    ("softcap", 2, "--seqpar-softcap 0.05"),
    ("causal", 3, "--seqpar-token-layout zigzag --seqpar-schedule ring"),
    ("causal", 4, "--seqpar-schedule ulysses+zigzag --seqpar-node-size 2"),
    ("latent", 1, "--seqpar-kernel reference"),
    ("latent", 2, "--seqpar-schedule balanced"),
    ("latent-batch", 2, "--deterministic-mode"),
]


@pytest.fixture(scope="module")
def reference(
    corpus: Corpus, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Setting, Trained]]:
    """A reference's settings and its run, which cases share."""
    runs: dict[str, tuple[Setting, Trained]] = {}

    def train(name: str) -> tuple[Setting, Trained]:
        if name not in runs:
            _, ranks, plain, latent, _ = wanted = REFERENCES[name]
            model = LATENT_MODEL if latent else tuple(MODEL)
            folder = tmp_path_factory.mktemp(name)
            setting = Setting(corpus, cache, folder, seq_length=LENGTH, model=model)
            options = shlex.split(wanted.options)
            runs[name] = setting, setting.train("reference", ranks, *options, plain=plain)
        return runs[name]

    return train


@pytest.mark.parametrize(
    ("name", "ranks", "flags"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE_CASES)],
)
def test_like_one_process(
    reference: Callable[[str], tuple[Setting, Trained]], name: str, ranks: int, flags: str
) -> None:
    setting, expected = reference(name)
    wanted = REFERENCES[name]
    if wanted.differs:
        _, causal = reference("causal")
        assert max(differences(expected.losses, causal.losses)) > 1e-4, "the flags must matter"
    size = ("--sequence-parallel-size", str(ranks // wanted.ranks))
    options = [*shlex.split(wanted.options), *shlex.split(flags), *size]
    check_same_run(setting.train(f"{ranks}-ranks", ranks, *options), expected)
