# SPDX-License-Identifier: Apache-2.0
"""The parts of pages that are made from code and results are those of the code and results."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest

from megatron_seqpar.integration.refusals import REFUSALS
from megatron_seqpar.integration.refusals_by_setting import BY_SETTING
from tests.docs.pages import DOCS, REPOSITORY, script


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    return script("make_docs")


def pinned(package: str) -> str:
    text = (REPOSITORY / "requirements" / "constraints.txt").read_text(encoding="utf-8")
    return dict(line.split("==") for line in text.splitlines() if "==" in line)[package]


OTHER_TYPER = version("typer") != pinned("typer")


@pytest.mark.parametrize(
    "page",
    [
        "index.md",
        "flags.md",
        "composition.md",
        pytest.param(
            "commands.md",
            marks=pytest.mark.skipif(OTHER_TYPER, reason="written by another typer's writer"),
        ),
    ],
)
def test_page_is_up_to_date(maker: ModuleType, page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    assert maker.made_anew(page, text) == text, "run: python scripts/make_docs.py"


def test_a_page_without_marks_is_an_error(maker: ModuleType) -> None:
    with pytest.raises(ValueError, match="no marks for the part 'flags'"):
        maker.made_anew("flags.md", "no flags here")


def test_a_stale_page_is_found_and_mended(
    maker: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    main = maker.main
    monkeypatch.setattr(maker, "DOCS", tmp_path)
    monkeypatch.setattr(maker, "ALL", ("composition.md",))
    right = (DOCS / "composition.md").read_text(encoding="utf-8")
    page = tmp_path / "composition.md"
    page.write_text(right.replace("`--yaml-cfg`", "`--another`"), encoding="utf-8")
    assert main(["--check"]) == 1
    assert "out of date: composition.md" in capsys.readouterr().err
    assert main([]) == 0
    assert page.read_text(encoding="utf-8") == right
    assert main(["--check"]) == 0


def test_the_table_has_every_refusal(maker: ModuleType) -> None:
    table = maker.refused()
    rows = [*REFUSALS, *(row for rows in BY_SETTING.values() for row in rows)]
    for row in rows:
        (line,) = [line for line in table.splitlines() if line.startswith(f"| `{row.flag}` |")]
        assert row.alternative in line
    assert len(table.splitlines()) == 2 + len({row.flag for row in rows})


def test_every_field_is_under_a_topic(maker: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(maker.TOPICS, "Memory", ("recompute",))
    with pytest.raises(ValueError, match="offload"):
        maker.flags()
