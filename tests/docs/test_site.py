# SPDX-License-Identifier: Apache-2.0
"""How links that leave docs/ look on the site."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.docs.pages import script

pytest.importorskip("mkdocs", reason="the extra 'docs' is not installed")


@pytest.mark.parametrize(
    ("page", "text", "expected"),
    [
        ("a.md", "[b](b.md#c)", "[b](b.md#c)"),
        ("a.md", "[x](https://example.org/../a)", "[x](https://example.org/../a)"),
        ("a.md", "[here](#there)", "[here](#there)"),
        ("a.md", "[how](../CONTRIBUTING.md#x)", "[how](contributing.md#x)"),
        ("a.md", "[`setup.py`](../setup.py)", "`setup.py`"),
        ("a.md", "[the set-up](../setup.py)", "the set-up (`setup.py`)"),
        (
            "a.md",
            "![x](../benchmarks/results/overlap.png)",
            "[![x](results/overlap.png)](results/overlap.png)",
        ),
        ("a.md", "[gone](../absent.md)", "[gone](../absent.md)"),
        ("contributing.md", "[a](docs/memory.md)", "[a](memory.md)"),
        ("patches.md", "[a](../docs/memory.md#b)", "[a](memory.md#b)"),
        ("a.md", "![x](images/y.png)", "[![x](images/y.png)](images/y.png)"),
        ("a.md", "| `--a B\\|C` | b \\| c |", "| `--a B|C` | b \\| c |"),
        ("a.md", "a `--flag` and `--flag 1`", "a `--flag`{ .flag } and `--flag 1`"),
        ("a.md", "```\n[b](../setup.py) `--c`\n```\n", "```\n[b](../setup.py) `--c`\n```\n"),
        ("a.md", "<!-- flags: begin -->\n| a |", "\n| a |"),
    ],
)
def test_links(page: str, text: str, expected: str) -> None:
    hooks = script("mkdocs_hooks")
    shown = SimpleNamespace(file=SimpleNamespace(src_uri=page))
    assert hooks.on_page_markdown(text, page=shown) == expected
