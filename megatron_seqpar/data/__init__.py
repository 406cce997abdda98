# SPDX-License-Identifier: Apache-2.0
"""Text to training data: documents, bytes as tokens, Megatron's indexed dataset.

documents.py   where the text comes from: a Python standard library, or a JSON-lines file
corpus.py      bytes as tokens, written with Megatron's own builder, reused when unchanged
"""

from megatron_seqpar.data.corpus import (
    VOCABULARY_SIZE,
    Corpus,
    prepare_corpus,
    tokenizer_arguments,
)
from megatron_seqpar.data.documents import Document, JsonLines, Source, StandardLibrary

__all__ = [
    "VOCABULARY_SIZE",
    "Corpus",
    "Document",
    "JsonLines",
    "Source",
    "StandardLibrary",
    "prepare_corpus",
    "tokenizer_arguments",
]
