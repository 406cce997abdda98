# SPDX-License-Identifier: Apache-2.0
"""Pages can be found and lead somewhere: navigation, links, named tests, commands."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from megatron_seqpar.cli import app
from tests.docs.pages import DOCS, PAGES, REPOSITORY, anchors, links, name, prose

TAKEN_IN = {"contributing.md", "changelog.md", "patches.md"}
"""Pages of the site that lie outside docs/ (scripts/mkdocs_hooks.py)."""


def in_navigation(part: Any) -> Iterator[str]:
    if isinstance(part, str):
        yield part
        return
    for inner in part.values() if isinstance(part, dict) else part:
        yield from in_navigation(inner)


def test_every_page_is_in_the_navigation_once() -> None:
    text = (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8")
    found = list(in_navigation(yaml.load(text, yaml.BaseLoader)["nav"]))
    assert len(found) == len(set(found))
    there = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert set(found) == there | TAKEN_IN


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    dead = []
    for path, anchor in links(page):
        target = (page.parent / path).resolve() if path else page
        if not target.exists():
            dead.append(path)
        elif anchor and anchor not in anchors(target):
            dead.append(f"{path}#{anchor}")
    assert dead == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_a_page_begins_with_its_one_title(page: Path) -> None:
    titles = re.findall(r"^# .*$", prose(page), re.MULTILINE)
    assert len(titles) == 1
    assert prose(page).startswith(titles[0])


def test_named_tests_exist() -> None:
    named = {
        (page, file, test)
        for page in PAGES
        for file, test in re.findall(r"(tests/[\w/]+\.py)::([\w*]+)", prose(page))
    }
    assert len(named) > 40
    for page, file, test in named:
        source = (REPOSITORY / file).read_text(encoding="utf-8")
        assert test == "*" or f"def {test}(" in source, f"{name(page)}: {file}::{test}"


def test_every_picture_of_the_docs_is_shown() -> None:
    shown = {(page.parent / path).resolve() for page in PAGES for path, _ in links(page)}
    assert sorted(path.name for path in DOCS.rglob("*.png") if path.resolve() not in shown) == []


def test_messages_of_the_troubleshooting_page_are_those_of_the_code() -> None:
    sources = [path.read_text("utf-8") for path in (REPOSITORY / "megatron_seqpar").rglob("*.py")]
    code = re.sub(r'"\s*\n\s*f?"', "", "\n".join(sources))  # literals over several lines, joined
    rows = re.findall(r"^\| `([^`]+)` \| ", (DOCS / "troubleshooting.md").read_text("utf-8"), re.M)
    assert len(rows) >= 8
    placeholders = r"--FLAG value|--[xy]\b\??|'[\w]+'|\b[A-Z]\b|\.\.\."
    for row in rows:
        for part in re.split(placeholders, row):
            assert part.strip(" :") in code, (row, part)


def options_of(words: list[str]) -> set[str]:
    """The options that a command line of ours may have."""
    command = typer.main.get_command(app)
    for word in words:
        inner = getattr(command, "commands", {}).get(word)
        if inner is None:
            break
        command = inner
    given = {name for one in command.params for name in (*one.opts, *one.secondary_opts)}
    return given | {"--help"}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_have_the_options_that_pages_give_them(page: Path) -> None:
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    wrong = []
    for line in re.findall(r"megatron-seqpar ((?:[a-z-]+ )+[^`\n]*)", text):
        try:
            words = shlex.split(line.split("#")[0])
        except ValueError:  # prose with an apostrophe
            continue
        known = options_of(words)
        if words[0] == "run":  # up to the script, whose flags are Megatron's
            script = next((i for i, word in enumerate(words) if word.endswith(".py")), 0)
            words = words[:script]
        given = {word.partition("=")[0] for word in words if re.fullmatch(r"--[\w-]+(=.*)?", word)}
        wrong += [f"{words[0]} {option}" for option in given - known]
    assert wrong == []
