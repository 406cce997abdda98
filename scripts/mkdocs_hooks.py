# SPDX-License-Identifier: Apache-2.0
"""Hooks of mkdocs.yml: the pages of docs/ link to the repository around them, the site has none.

The same Markdown is read in the repository and on the site. A link that leaves docs/ becomes

- a page, where the site takes that page in (`PAGES`),
- the copied picture, for pictures of measured results,
- the path, as code, for every other file.

A link to something that does not exist is left as it is, and the strict build stops at it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "patches/README.md": "patches.md",
}
"""Page of the repository -> where it is on the site."""
RESULTS = "benchmarks/results"
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s]+)\)")
BLOCK = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
FLAG = re.compile(r"(?<!`)(`--[\w-]+`)(?!`)")
BAR = re.compile(r"`[^`\n|]*\\\|[^`\n]*`")
MARK = re.compile(r"^<!-- [\w-]+: (?:begin|end) -->$", re.MULTILINE)


def on_files(files: Files, config: Any) -> Files:
    """Take in the pages and pictures that lie outside docs/."""
    for source, target in PAGES.items():
        text = (REPOSITORY / source).read_text(encoding="utf-8")
        files.append(File.generated(config, target, content=text))
    for picture in sorted((REPOSITORY / RESULTS).glob("*.png")):
        target = f"results/{picture.name}"
        files.append(File.generated(config, target, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page as the site's parser wants it; blocks of code stay as they are.

    Links are turned; flags are kept on one line; the marks around generated parts are taken out,
    and so is the backslash before a bar in a table's code, which the parser would show.
    """
    here = page.file.src_uri
    sources = {target: source for source, target in PAGES.items()}
    source = sources.get(here, f"docs/{here}")
    parts = BLOCK.split(markdown)
    for index in range(0, len(parts), 2):
        text = LINK.sub(lambda link: turned(link, source, here), parts[index])
        text = BAR.sub(lambda row: row[0].replace("\\|", "|"), text)
        text = FLAG.sub(r"\1{ .flag }", text)
        parts[index] = MARK.sub("", text)
    return "".join(parts)


def turned(link: re.Match[str], source: str, here: str) -> str:
    """The link as the site has it. source: the page in the repository; here: on the site."""
    picture, text, target = link.groups()
    path, hash_, anchor = target.partition("#")
    if not path or ":" in path:
        return link[0]
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    if path.startswith("docs/") or not (REPOSITORY / path).exists():
        place = path.removeprefix("docs/") if path.startswith("docs/") else None
    elif path in PAGES:
        place = PAGES[path]
    elif picture:
        place = path.replace(RESULTS, "results", 1)
    else:
        return f"`{path}`" if text.strip("`") in path else f"{text} (`{path}`)"
    if place is None:
        return link[0]
    target = f"{posixpath.relpath(place, posixpath.dirname(here))}{hash_}{anchor}"
    shown = f"{picture}[{text}]({target})"
    return f"[{shown}]({target})" if picture else shown  # a click shows the picture in full size
