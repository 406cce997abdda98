# SPDX-License-Identifier: Apache-2.0
"""The data of an experiment: built once, and told apart from other data by a fingerprint."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from megatron_seqpar.data import Corpus, JsonLines, Source, StandardLibrary, prepare_corpus

STDLIB = "stdlib"


def corpus_of(
    data: str, folder: Path, console: Console, *, key: str = "text", fresh: bool = False
) -> Corpus:
    """Build or reuse the corpus of `data` ('stdlib' or a JSON-lines file), with a progress bar."""
    source: Source = StandardLibrary() if data == STDLIB else JsonLines(Path(data), key)
    name = STDLIB if data == STDLIB else Path(data).stem
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("corpus", total=source.size)
        corpus = prepare_corpus(
            source,
            folder / name,
            key=key,
            fresh=fresh,
            on_progress=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    state = "reused" if corpus.reused else "written"
    console.print(
        f"corpus {state}: {corpus.documents:,} documents, {corpus.tokens:,} tokens (bytes), "
        f"longest {corpus.longest:,}"
    )
    return corpus


def unmade(data: str, folder: Path, *, key: str = "text") -> Corpus:
    """The corpus as `corpus_of` would name it, without making it: for commands to be shown."""
    name = STDLIB if data == STDLIB else Path(data).stem
    return Corpus(str(folder / f"{name}_{key}_document"), 0, 0, 0, 0, 0)


def fingerprint(corpus: Corpus) -> str:
    """What tells this corpus from another, wherever it lies."""
    record = Path(corpus.data_path + ".json").read_text(encoding="utf-8")
    return f"{corpus.tokens}:{record}"
