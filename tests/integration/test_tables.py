# SPDX-License-Identifier: Apache-2.0
"""The documentation's tables are those of the code."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_seqpar.integration import tables

PAGE = Path(__file__).parents[2] / "docs" / "megatron.md"


def test_page_is_up_to_date():
    pytest.importorskip("megatron.core")
    text = PAGE.read_text()
    assert tables.rewrite(text) == text, (
        "run: python -m megatron_seqpar.integration.tables docs/megatron.md"
    )


def test_page_without_marks_is_an_error():
    with pytest.raises(ValueError, match="patch-points"):
        tables.rewrite("no tables here")
