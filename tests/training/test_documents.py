# SPDX-License-Identifier: Apache-2.0
"""Training on documents that do not see each other: the axis against one process.

The reference is Megatron's own attention and dense mask in one process. It takes no packed batch on
the CPU; a packed run trains on the same samples, with rotary positions that start again in every
document, which changes no difference of positions and so no attention.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shlex
from pathlib import Path

import pytest

from megatron_seqpar.data import Corpus, JsonLines, StandardLibrary, prepare_corpus
from tests.training.runs import TOOLS, Setting, Trained
from tests.training.test_parity import check_same_run, differences

pytest.importorskip("megatron.training")

CHECKOUT = os.environ.get("MEGATRON_LM_PATH")
RESET = ("--reset-attention-mask", "--reset-position-ids", "--eod-mask-loss")
PACKED = ("--dataloader-inter-document-masking", "--eod-mask-loss")
STEPS = 50


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Documents of 1 to 900 characters of Python's library, most of them short."""
    folder, draw = tmp_path_factory.mktemp("short"), random.Random(7)
    text = next(StandardLibrary().documents()).text[:400_000]
    at = 0
    with (folder / "documents.jsonl").open("w") as lines:
        while at < len(text):
            size = min(900, 1 + int(draw.lognormvariate(3.5, 1.5)))
            lines.write(json.dumps({"text": text[at : at + size]}) + "\n")
            at += size
    return prepare_corpus(JsonLines(folder / "documents.jsonl"), folder / "short")


@pytest.fixture(scope="module")
def setting(short: Corpus, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(
        short, cache, tmp_path_factory.mktemp("runs"), steps=STEPS, dense_masks=True, extra=RESET
    )


@pytest.fixture(scope="module")
def reference(setting: Setting) -> Trained:
    """One process, Megatron's own attention, a dense mask in the data loader."""
    return setting.train("one-rank", 1)


LAYOUTS = [
    pytest.param(2, "--sequence-parallel-size 2", id="sp2"),
    pytest.param(3, "--sequence-parallel-size 3", id="sp3", marks=pytest.mark.slow),
    pytest.param(
        4,
        "--sequence-parallel-size 2 --tensor-model-parallel-size 2 --sequence-parallel",
        id="sp2-tp2-tpsp",
        marks=pytest.mark.slow,
    ),
    pytest.param(1, "--seqpar-kernel cpu", id="one-rank-our-attention"),
]


@pytest.mark.parametrize(("ranks", "layout"), LAYOUTS)
def test_documents_reset_the_mask(
    setting: Setting, reference: Trained, ranks: int, layout: str, request: pytest.FixtureRequest
) -> None:
    name = request.node.callspec.id
    check_same_run(setting.train(name, ranks, *shlex.split(layout)), reference, learnt=0.1)


@pytest.mark.parametrize(("ranks", "layout"), LAYOUTS)
def test_documents_are_packed(
    setting: Setting, reference: Trained, ranks: int, layout: str, request: pytest.FixtureRequest
) -> None:
    packed = dataclasses.replace(setting, extra=PACKED)
    run = packed.train("packed-" + request.node.callspec.id, ranks, *shlex.split(layout))
    check_same_run(run, reference, learnt=0.1)


@pytest.mark.slow
def test_several_samples_in_a_micro_batch(setting: Setting) -> None:
    """Each with documents of its own: in one batch with a mask a sample, or all laid end to end."""
    several = ("--micro-batch-size", "2")
    reference = setting.train("one-rank-2", 1, *several)
    layout = ("--sequence-parallel-size", "2", *several)
    check_same_run(setting.train("sp2-2", 2, *layout), reference, learnt=0.1)
    packed = dataclasses.replace(setting, extra=PACKED).train("packed-sp2-2", 2, *layout)
    check_same_run(packed, reference, learnt=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--reset-attention-mask", "--reset-position-ids"])
def test_each_flag_alone(setting: Setting, flag: str) -> None:
    alone = dataclasses.replace(
        setting, extra=(flag, "--position-embedding-type", "learned_absolute")
    )
    reference = alone.train("one-rank" + flag, 1)
    run = alone.train("sp2" + flag, 2, "--sequence-parallel-size", "2")
    check_same_run(run, reference, learnt=0.1)


@pytest.mark.slow
@pytest.mark.skipif(CHECKOUT is None, reason="MEGATRON_LM_PATH names no Megatron-LM checkout")
def test_hybrid_model(setting: Setting) -> None:
    at = setting.model.index("--num-layers")
    hybrid = dataclasses.replace(
        setting,
        model=setting.model[:at] + setting.model[at + 2 :],
        script=(Path(str(CHECKOUT)) / "pretrain_hybrid.py",),
    )
    spec = ("--spec", "local_hybrid_spec", "hybrid_stack_spec", "--hybrid-layer-pattern", "*-*-")
    reference = hybrid.train("hybrid", 1, *spec)
    for name, extra in (("masked", RESET), ("packed", PACKED)):
        split = dataclasses.replace(hybrid, extra=extra)
        run = split.train("hybrid-" + name, 2, *spec, "--sequence-parallel-size", "2")
        check_same_run(run, reference, learnt=0.1)


@pytest.mark.slow
def test_stages_between_attend_inside_documents_too(setting: Setting) -> None:
    """From one checkpoint: one process, and three pipeline stages with our attention.

    Megatron seeds stages apart, hence the checkpoint, and hands no mask to the one between.
    """
    folder = str(setting.folder / "checkpoint")
    model = ("--num-layers", "3", "--lr-decay-iters", str(STEPS))
    start = dataclasses.replace(setting, steps=2)
    start.train("start", 1, *model, "--save", folder, "--save-interval", "2")
    reference = setting.train("one-rank-3-layers", 1, *model)
    resumed = dataclasses.replace(setting, steps=STEPS - 2)
    stages = ("--pipeline-model-parallel-size", "3", "--seqpar-kernel", "cpu", "--load", folder)
    stages += ("--train-iters", str(STEPS), "--override-opt_param-scheduler")
    for name, extra in (("masked", RESET), ("packed", PACKED)):
        run = dataclasses.replace(resumed, extra=extra).train("pp3-" + name, 3, *model, *stages)
        for ours, expected in (
            (run.losses, reference.losses[2:]),
            (run.grad_norms, reference.grad_norms[2:]),
        ):
            assert max(differences(ours, expected)) <= 1e-5


@pytest.fixture(scope="module")
def conversations(setting: Setting) -> Setting:
    """Runs of Megatron's own `pretrain_gpt.py --sft`, in samples of 381 = 3 x 127 tokens."""
    path, draw = setting.folder / "conversations.jsonl", random.Random(3)
    text = next(StandardLibrary().documents()).text
    with path.open("w") as lines:
        for _ in range(60):
            messages = []
            for _ in range(draw.randint(1, 12)):
                at, asked, answered = (draw.randint(1, most) for most in (100_000, 20, 120))
                messages += [
                    {"role": "system", "content": "#"},
                    {"role": "user", "content": text[at : at + asked]},
                    {"role": "assistant", "content": text[at + asked : at + asked + answered]},
                ]
            lines.write(json.dumps({"messages": messages}) + "\n")
    return dataclasses.replace(
        setting,
        corpus=dataclasses.replace(setting.corpus, data_path=str(path)),
        seq_length=381,
        extra=("--sft", "--null-tokenizer-pad-id", "1"),
        script=(TOOLS / "sft_text.py", Path(str(CHECKOUT)) / "pretrain_gpt.py"),
    )


@pytest.mark.skipif(CHECKOUT is None, reason="MEGATRON_LM_PATH names no Megatron-LM checkout")
@pytest.mark.slow
@pytest.mark.parametrize("options", ["", "--micro-batch-size 2", "--mtp-num-layers 1"])
def test_conversations_are_packed(conversations: Setting, options: str) -> None:
    """Unpadded, whatever their lengths; prompts do not count, so neither do whole chunks."""
    name, more = options.replace(" ", ""), shlex.split(options)
    reference = conversations.train("sft-one-rank" + name, 1, "--seqpar-kernel", "cpu", *more)
    layout = ("--sequence-parallel-size", "3")
    check_same_run(conversations.train("sft-sp3" + name, 3, *layout, *more), reference, learnt=0.1)
