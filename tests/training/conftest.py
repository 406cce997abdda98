# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest

from megatron_seqpar.data import Corpus, StandardLibrary, prepare_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """The quickstart's corpus: Python's own library, one token a byte."""
    return prepare_corpus(StandardLibrary(), tmp_path_factory.mktemp("corpus") / "stdlib")


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where Megatron keeps the sample index of the corpus."""
    return tmp_path_factory.mktemp("cache")
