# SPDX-License-Identifier: Apache-2.0
"""Text to training data: documents, token ids, Megatron's indexed dataset.

documents.py   where the text comes from: a Python standard library, or a JSON-lines file
tokens.py      ids of text: bytes, or any Hugging Face tokenizer
corpus.py      ids written with Megatron's own builder, reused when unchanged
"""

from megatron_seqpar.data.corpus import (
    VOCABULARY_SIZE,
    Corpus,
    prepare_corpus,
    tokenizer_arguments,
)
from megatron_seqpar.data.documents import Document, JsonLines, Source, StandardLibrary
from megatron_seqpar.data.tokens import Bytes, HuggingFace, Tokens

__all__ = [
    "VOCABULARY_SIZE",
    "Bytes",
    "Corpus",
    "Document",
    "HuggingFace",
    "JsonLines",
    "Source",
    "StandardLibrary",
    "Tokens",
    "prepare_corpus",
    "tokenizer_arguments",
]
