# SPDX-License-Identifier: Apache-2.0
"""`megatron-seqpar prepare-data`: text to a corpus that Megatron trains on."""

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from megatron_seqpar.errors import SeqParError


def prepare_data(
    output_prefix: Annotated[
        Path, typer.Option(help="Folder and start of the names of the files to write.")
    ] = Path("runs/data/stdlib"),
    input: Annotated[
        Path | None,
        typer.Option(help="JSON-lines file; default: the source of Python's standard library."),
    ] = None,
    json_key: Annotated[
        str, typer.Option(help="Key of the text in each line of --input.")
    ] = "text",
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="A Hugging Face tokenizer: a model's name or a folder; default: bytes as tokens."
        ),
    ] = None,
    fresh: Annotated[bool, typer.Option(help="Write even if nothing changed.")] = False,
) -> None:
    """Build a corpus with Megatron's indexed-dataset builder; one token a byte by default."""
    from megatron_seqpar.data import (
        Bytes,
        HuggingFace,
        JsonLines,
        Source,
        StandardLibrary,
        Tokens,
        prepare_corpus,
    )

    console = Console()
    try:
        source: Source = StandardLibrary() if input is None else JsonLines(input, json_key)
        tokens: Tokens = Bytes() if tokenizer is None else HuggingFace(tokenizer)
        with Progress(console=console, transient=True) as progress:
            bar = progress.add_task("corpus", total=source.size)
            corpus = prepare_corpus(
                source,
                output_prefix,
                key=json_key,
                fresh=fresh,
                tokens=tokens,
                on_progress=lambda done, total: progress.update(bar, completed=done, total=total),
            )
    except SeqParError as error:
        Console(stderr=True).print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    state = "unchanged, reused" if corpus.reused else "written"
    console.print(
        f"corpus {state}: {corpus.documents:,} documents, {corpus.tokens:,} tokens, the longest "
        f"{corpus.longest:,}",
        highlight=False,
    )
    if corpus.empty:
        console.print(f"left out {corpus.empty:,} documents without text")
    if corpus.dropped_nul:
        console.print(f"took {corpus.dropped_nul:,} NUL characters out of the text")
    arguments = ["--data-path", corpus.data_path, *tokens.arguments()]
    console.print(f"train on it with: {shlex.join(arguments)}", highlight=False, soft_wrap=True)
