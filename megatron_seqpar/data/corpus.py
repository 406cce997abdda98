# SPDX-License-Identifier: Apache-2.0
"""Documents to Megatron's indexed dataset, one token a byte where no tokenizer is named."""

import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_seqpar.data.documents import Document, Source
from megatron_seqpar.data.tokens import BYTE_END, BYTE_VOCABULARY, Bytes, Tokens
from megatron_seqpar.errors import SeqParError

VOCABULARY_SIZE = BYTE_VOCABULARY
END_OF_DOCUMENT = BYTE_END
TOGETHER = 64
"""Documents whose ids are made together: tokenizers share them out over threads."""
FORMAT = 1  # raise it when the same documents would be written differently


def tokenizer_arguments() -> list[str]:
    """Megatron's arguments for a corpus of bytes."""
    return Bytes().arguments()


@dataclass(frozen=True)
class Corpus:
    """A corpus on disk. `data_path` is what `--data-path` takes; `reused` if nothing was written.

    `tokens` counts the end-of-document tokens; `longest` is in tokens. `dropped_nul` counts NUL
    characters taken out of the text, `empty` the documents without text that were left out.
    """

    data_path: str
    documents: int
    tokens: int
    longest: int
    empty: int
    dropped_nul: int
    reused: bool = False


def prepare_corpus(
    source: Source,
    output_prefix: str | os.PathLike[str],
    *,
    key: str = "text",
    fresh: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
    tokens: Tokens | None = None,
) -> Corpus:
    """Write `<output_prefix>_<key>_document.{bin,idx}`, or reuse them when nothing changed.

    Args:
        source: where the documents come from.
        output_prefix: folder and first part of the file names; folders are made.
        key: second part of the file names (Megatron's own preprocessing names files so).
        fresh: write even when an unchanged corpus is there.
        on_progress: called with (bytes read, bytes in all).
        tokens: how ids are made of text; default: one a byte.
    Raises:
        SeqParError: the source is unreadable or holds no text; nothing is left behind.
    """
    prefix = Path(f"{os.fspath(output_prefix)}_{key}_document")
    binary, index = _with_ending(prefix, ".bin"), _with_ending(prefix, ".idx")
    record = _with_ending(prefix, ".json")
    tokens = tokens or Bytes()
    fingerprint = {"format": FORMAT, **source.fingerprint(), **tokens.fingerprint()}
    if not fresh:
        found = _read_record(record, fingerprint, binary, index)
        if found is not None:
            return found

    prefix.parent.mkdir(parents=True, exist_ok=True)
    suffix = f".partial-{os.getpid()}"
    partial_binary, partial_index, partial_record = (
        path.with_name(path.name + suffix) for path in (binary, index, record)
    )
    try:
        corpus = _write(source, tokens, prefix, partial_binary, partial_index, on_progress)
        written = {
            "fingerprint": fingerprint,
            "sizes": [partial_binary.stat().st_size, partial_index.stat().st_size],
            "corpus": asdict(corpus),
        }
        partial_record.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
        # The record goes away first and comes back last: it never vouches for a mixed pair.
        record.unlink(missing_ok=True)
        os.replace(partial_binary, binary)
        os.replace(partial_index, index)
        os.replace(partial_record, record)
    finally:
        for path in (partial_binary, partial_index, partial_record):
            path.unlink(missing_ok=True)
    return corpus


def _with_ending(prefix: Path, ending: str) -> Path:
    return prefix.with_name(prefix.name + ending)


def _read_record(
    record: Path, fingerprint: dict[str, object], binary: Path, index: Path
) -> Corpus | None:
    """The corpus on disk if it was made from the same documents and is whole, else None."""
    try:
        content: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
        sizes = [binary.stat().st_size, index.stat().st_size]
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    if content.get("fingerprint") != fingerprint or content.get("sizes") != sizes:
        return None
    # The folder may have been moved since.
    return Corpus(**{**content["corpus"], "data_path": str(binary.with_suffix("")), "reused": True})


def _write(
    source: Source,
    tokens: Tokens,
    prefix: Path,
    binary: Path,
    index: Path,
    on_progress: Callable[[int, int], None] | None,
) -> Corpus:
    # Imported here: reading the package must not import torch or Megatron. What they warn about
    # on import (optimizers, a compiler for CUDA) is of no interest for writing data.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(binary), dtype=DType.optimal_dtype(tokens.vocabulary))
    documents = count = longest = empty = dropped_nul = 0
    total = source.size
    for group in _groups(source.documents()):
        for ids, dropped in tokens.encode([document.text for document in group]):
            dropped_nul += dropped
            if len(ids) == 0:
                empty += 1
                continue
            builder.add_item(torch.from_numpy(ids))
            builder.end_document()
            documents += 1
            count += len(ids)
            longest = max(longest, len(ids))
        if on_progress is not None:
            on_progress(group[-1].position, total)
    builder.finalize(str(index))
    if documents == 0:
        raise SeqParError("the input holds no text: not one document with at least one character")
    return Corpus(str(prefix), documents, count, longest, empty, dropped_nul)


def _groups(documents: Iterator[Document]) -> Iterator[list[Document]]:
    group: list[Document] = []
    for document in documents:
        group.append(document)
        if len(group) == TOGETHER:
            yield group
            group = []
    if group:
        yield group
