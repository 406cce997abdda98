# SPDX-License-Identifier: Apache-2.0
"""Documents that do not see each other, together with windows and the zigzag token layout."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from megatron_seqpar.data import Corpus
from tests.training.runs import Setting
from tests.training.test_documents import RESET, STEPS, short
from tests.training.test_parity import check_same_run

pytest.importorskip("megatron.training")

__all__ = ["short"]
WINDOW = {"window": [30, 0]}


@pytest.mark.parametrize(
    ("ranks", "flags", "plain"),
    [
        pytest.param(2, "--window-size 30,0", WINDOW, id="window"),
        pytest.param(
            3,
            "--window-size 30,0 --seqpar-token-layout zigzag",
            WINDOW,
            id="window-zigzag",
            marks=pytest.mark.slow,
        ),
        pytest.param(2, "--seqpar-token-layout zigzag", None, id="zigzag", marks=pytest.mark.slow),
    ],
)
def test_documents_with(
    short: Corpus, cache: Path, tmp_path: Path, ranks: int, flags: str, plain: dict | None
) -> None:
    setting = Setting(short, cache, tmp_path, STEPS, dense_masks=True, extra=RESET)
    reference = setting.train("one-rank", 1, plain=plain)
    layout = ("--sequence-parallel-size", str(ranks), *shlex.split(flags))
    check_same_run(setting.train("split", ranks, *layout), reference, learnt=0.1)
