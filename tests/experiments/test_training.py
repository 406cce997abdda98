# SPDX-License-Identifier: Apache-2.0
"""Megatron's flags of a training."""

from pathlib import Path

import pytest

from megatron_seqpar.data import Corpus
from megatron_seqpar.errors import SeqParError
from megatron_seqpar.experiments.training import Training, flags, model_arguments
from megatron_seqpar.mfu import read_flags
from megatron_seqpar.shipped import model_file

MODEL = model_file("quickstart")


def training(**changes) -> Training:
    corpus = Corpus("data/x_text_document", 1, 2, 3, 0, 0)
    return Training(MODEL, corpus, Path("cache"), 5, 8192, 1, **changes)


def last(arguments: list[str], flag: str) -> str:
    """The value that argparse takes: the last one."""
    return arguments[len(arguments) - arguments[::-1].index(flag)]


def test_flags() -> None:
    assert flags({"a": 1, "b": True, "c": False, "d": None, "e": 2e-3}) == [
        *("--a", "1", "--b", "--e", "0.002")
    ]


def test_the_quickstart_model_is_llama_shaped() -> None:
    model = read_flags(MODEL)
    assert (model["normalization"], model["swiglu"]) == ("RMSNorm", True)
    assert model["position-embedding-type"] == "rope"
    assert model["num-query-groups"] < model["num-attention-heads"]
    assert model["untie-embeddings-and-output-weights"]
    assert model["disable-bias-linear"]


def test_what_is_asked_for_wins() -> None:
    arguments = training(changes={"num-layers": 7}, extra={"lr": 1.0, "bf16": True}).arguments()
    assert last(arguments, "--num-layers") == "7"
    assert last(arguments, "--lr") == "1.0"
    assert "--bf16" in arguments
    assert training(changes={"swiglu": None}).arguments().count("--swiglu") == 0


def test_a_model_keeps_its_vocabulary_and_others_take_that_of_bytes() -> None:
    assert last(training().arguments(), "--vocab-size") == "256"
    assert training().sizes().vocab == 256
    large = training(changes={"vocab-size": 32000})
    assert last(large.arguments(), "--vocab-size") == "32000"
    assert large.sizes().vocab == 32000


@pytest.mark.parametrize("text", ["[1, 2]", "a: {b: 1}", "a: ["])
def test_a_model_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "m.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(SeqParError, match="--model"):
        model_arguments(tmp_path / "m.yaml")


def test_a_missing_model_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SeqParError, match="No such file"):
        model_arguments(tmp_path / "m.yaml")
