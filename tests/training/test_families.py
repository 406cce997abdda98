# SPDX-License-Identifier: Apache-2.0
"""Model families: their full-size files parse, and small models of their shape train alike.

Small models (`families.small`) train on real text through the launcher: one process with stock
attention, or textbook attention where stock Megatron cannot do what the family needs, against two
ranks of the axis, plain and with everything on that saves memory.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_seqpar.data import Corpus
from megatron_seqpar.mfu import read_flags
from tests.integration.dump_gradients import compare
from tests.training import families
from tests.training.families import FAMILIES, LENGTH
from tests.training.runs import ROOT, Setting, Trained
from tests.training.test_parity import check_same_run

pytest.importorskip("megatron.training")

STEPS = 12
LEARNT = 0.05
"""The part of the first loss that so few steps must take off."""

TENSOR_PARALLEL = "--tensor-model-parallel-size 2"
ODD_AND_EVEN = ("llama2-33-heads", "llama2")
PARSED_WITH = (
    "--sequence-parallel-size 4 --seq-length 8192 --max-position-embeddings 8192 "
    "--micro-batch-size 1 --train-iters 1 --lr 1e-4 --bf16 --mock-data "
    "--tokenizer-type NullTokenizer --no-create-attention-mask-in-dataloader"
)


@pytest.fixture(scope="module")
def parsed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Each family's file as Megatron's configuration, and two with tensor parallelism."""
    out = tmp_path_factory.mktemp("parsed") / "models.json"
    wanted = [str(family.path) for family in FAMILIES.values()]
    wanted += [f"{FAMILIES[name].path} {TENSOR_PARALLEL}" for name in ODD_AND_EVEN]
    command = [sys.executable, "-m", "megatron_seqpar", "run", "--device", "cpu"]
    command += ["tests/training/parse_models.py", str(out), *shlex.split(PARSED_WITH)]
    environment = {**os.environ, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "8"}
    done = subprocess.run(
        [*command, "--", *wanted],
        capture_output=True,
        text=True,
        timeout=280,
        env={**environment, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    content: dict[str, dict[str, Any]] = json.loads(out.read_text())
    return content


def test_every_full_size_file_is_a_family() -> None:
    """So that none goes untested; smaller ones than those belong to benchmarks and examples."""
    full = {path for path in families.MODELS.glob("*.yaml") if layers(path) >= 28}
    assert full == {family.path for family in FAMILIES.values()}


def layers(path: Path) -> int:
    return int(read_flags(path)["num-layers"])


@pytest.mark.parametrize("name", FAMILIES)
def test_the_full_size_file_is_the_published_model(
    name: str, parsed: dict[str, dict[str, Any]]
) -> None:
    """Megatron and the plugin take it on four ranks, and its parameters are as many."""
    family = FAMILIES[name]
    config = parsed[str(family.path)]
    assert "error" not in config, config["error"]
    assert config["context_parallel_size"] == 4, "the axis is folded in"
    assert families.parameters(config) == family.parameters - family.missing


def test_the_full_size_gemma_has_its_attention(parsed: dict[str, dict[str, Any]]) -> None:
    """A window in every other layer, bounded logits, scaled queries and embeddings, GeGLU."""
    config = parsed[str(FAMILIES["gemma2"].path)]
    assert config["window_size"] == [4095, 0]
    assert config["window_attn_skip_freq"] == 2
    assert float(config["softcap"]) == 50.0
    assert config["softmax_scale"] == 256**-0.5
    assert config["mup_embedding_mult"] == pytest.approx(3584**0.5, rel=1e-15)
    assert config["mup_output_mult"] == config["mup_width_mult"] == 1.0
    assert config["activation_func"] == "quick_gelu"
    assert config["gated_linear_unit"]


def test_tensor_parallelism_cannot_share_out_33_heads(parsed: dict[str, dict[str, Any]]) -> None:
    """Which is Megatron's word, with an axis of four; 32 heads go over two ranks and the axis."""
    odd, even = (parsed[f"{FAMILIES[name].path} {TENSOR_PARALLEL}"] for name in ODD_AND_EVEN)
    assert "num_attention_heads (33)" in odd["error"]
    assert "error" not in even, even["error"]


MEMORY = "--seqpar-recompute attention-output --seqpar-loss-chunks 3"
LAYOUTS = {"sp2": (2, ""), "sp2-memory": (2, MEMORY), "sp4": (4, "")}
"""Name -> size of the axis, and what else is asked for."""
QUICK = [("gemma2", "sp2-memory")]
SLOW = [
    *((name, layout) for name in FAMILIES for layout in ("sp2", "sp2-memory")),
    ("llama2-33-heads", "sp4"),
]
CASES = [*QUICK, *(pytest.param(*c, marks=pytest.mark.slow) for c in SLOW if c not in QUICK)]


def setting_of(name: str, corpus: Corpus, cache: Path, folder: Path, *without: str) -> Setting:
    """Runs of a family's small version, with none of the flags `without`."""
    flags = families.small(FAMILIES[name].path)
    kept = {flag: value for flag, value in flags.items() if flag not in without}
    return Setting(
        corpus,
        cache,
        folder,
        steps=STEPS,
        seq_length=LENGTH,
        model=families.arguments(kept),
    )


def reference_of(setting: Setting, name: str) -> Trained:
    """One process, with stock attention or textbook attention."""
    plain = FAMILIES[name].plain
    stock = Setting(**{**vars(setting), "model": families.without_ours(setting.model)})
    return stock.train("reference", 1, plain=plain)


@pytest.fixture(scope="module")
def reference(
    corpus: Corpus, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Setting, Trained]]:
    """A family's settings and its reference, which cases share."""
    runs: dict[str, tuple[Setting, Trained]] = {}

    def train(name: str) -> tuple[Setting, Trained]:
        if name not in runs:
            setting = setting_of(name, corpus, cache, tmp_path_factory.mktemp(name))
            runs[name] = setting, reference_of(setting, name)
        return runs[name]

    return train


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_small_version_trains_like_one_process(
    reference: Callable[[str], tuple[Setting, Trained]], name: str, layout: str
) -> None:
    setting, expected = reference(name)
    ranks, flags = LAYOUTS[layout]
    arguments = ["--sequence-parallel-size", str(ranks), *shlex.split(flags)]
    if flags and "num-experts" not in families.small(FAMILIES[name].path):
        arguments += ["--seqpar-mlp-chunks", "3"]  # experts are not cut
    ours = setting.train(layout, ranks, *arguments)
    assert {entry["sp_rank"] for entry in ours.report["ranks"]} == set(range(ranks))
    check_same_run(ours, expected, LEARNT)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "flag"),
    [
        ("mistral", "window-size"),
        ("gemma2", "window-size"),
        ("gemma2", "window-attn-skip-freq"),
        ("gemma2", "seqpar-softcap"),
        ("gemma2", "mup-embedding-mult"),
        ("mixtral", "moe-aux-loss-coeff"),
    ],
)
def test_what_is_special_shows(
    reference: Callable[[str], tuple[Setting, Trained]],
    corpus: Corpus,
    cache: Path,
    tmp_path: Path,
    name: str,
    flag: str,
) -> None:
    """Without the flag gradients are a hundred times further off than the bound of the others."""
    _, expected = reference(name)
    setting = setting_of(name, corpus, cache, tmp_path, flag)
    ours = setting.train("without", 2, "--sequence-parallel-size", "2")
    assert max(compare(ours.gradients, expected.gradients).values()) > 1e-3
