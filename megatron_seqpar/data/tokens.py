# SPDX-License-Identifier: Apache-2.0
"""How text becomes token ids: one a byte, or by any Hugging Face tokenizer."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from megatron_seqpar.errors import SeqParError

BYTE_VOCABULARY = 256
BYTE_END = 0

Ids = np.ndarray[Any, np.dtype[Any]]


class Tokens(Protocol):
    """A way to make ids of text."""

    @property
    def vocabulary(self) -> int:
        """How many ids there are."""

    def encode(self, texts: Sequence[str]) -> list[tuple[Ids, int]]:
        """Ids of each text, its end of document included, and the characters that were left out.

        A text of which nothing is left has no ids, not even an end.
        """

    def fingerprint(self) -> dict[str, object]:
        """Plain values that change when the same text would get other ids."""

    def arguments(self) -> list[str]:
        """Megatron's arguments for a corpus of such ids."""


class Bytes:
    """The 256 byte values of UTF-8 text; byte 0, which text does not use, ends a document.

    Stock Megatron serves such ids with its `NullTokenizer`, so no tokenizer file is needed.
    """

    vocabulary = BYTE_VOCABULARY

    def encode(self, texts: Sequence[str]) -> list[tuple[Ids, int]]:
        """One id a byte; NUL characters are left out."""
        found = []
        for text in texts:
            ids = np.frombuffer(text.encode("utf-8", errors="replace"), dtype=np.uint8)
            kept = ids[ids != BYTE_END]
            whole = np.append(kept, np.uint8(BYTE_END)) if len(kept) else kept
            found.append((whole, len(ids) - len(kept)))
        return found

    def fingerprint(self) -> dict[str, object]:
        return {}

    def arguments(self) -> list[str]:
        """For the megatron-core that is installed here.

        Before 0.18 the id that ends documents cannot be named and comes on top of the vocabulary:
        it is 255 then, which UTF-8 does not use either.
        """
        tokenizer = ["--tokenizer-type", "NullTokenizer", "--vocab-size"]
        if not _names_the_end():
            return [*tokenizer, str(BYTE_VOCABULARY - 1)]
        return [*tokenizer, str(BYTE_VOCABULARY), "--null-tokenizer-eod-id", str(BYTE_END)]


def _names_the_end() -> bool:
    """Whether this megatron-core has --null-tokenizer-eod-id; yes where none is installed."""
    try:
        major, minor = importlib.metadata.version("megatron-core").split(".")[:2]
    except importlib.metadata.PackageNotFoundError:
        return True
    return (int(major), int(minor)) >= (0, 18)


class HuggingFace:
    """The tokenizer of a Hugging Face model, as Megatron's `HuggingFaceTokenizer` uses it.

    Special tokens are added as the tokenizer does by itself, a beginning of text for example, and
    its end-of-sequence token ends a document.
    """

    def __init__(self, name_or_path: str) -> None:
        """`name_or_path` is a model's name, or a folder with its tokenizer.

        Raises SeqParError where transformers is missing, the tokenizer cannot be had, or it has no
        end-of-sequence token.
        """
        try:
            from transformers import AutoTokenizer
        except ImportError:
            raise SeqParError(
                f"--tokenizer {name_or_path}: transformers is not installed (pip install "
                "'megatron_seqpar[hf]'); without it leave --tokenizer out, for one token a byte"
            ) from None
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(name_or_path)
        except (OSError, ValueError) as error:
            raise SeqParError(
                f"--tokenizer {name_or_path}: neither a model that can be had from here nor a "
                f"folder with a tokenizer: {str(error).splitlines()[0]}"
            ) from None
        self.name = name_or_path
        end = self._tokenizer.eos_token_id
        end = self._tokenizer.sep_token_id if end is None else end  # Megatron takes it, too
        if end is None:
            raise SeqParError(
                f"--tokenizer {name_or_path}: it has no end-of-sequence token, and a document "
                "would have no end"
            )
        self._end = int(end)

    @property
    def vocabulary(self) -> int:
        return len(self._tokenizer)

    def encode(self, texts: Sequence[str]) -> list[tuple[Ids, int]]:
        """Ids by the tokenizer, which leaves nothing out."""
        if not texts:
            return []
        bare = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
        every = self._tokenizer(list(texts), **bare)["input_ids"]
        found = []
        for text, ids in zip(texts, every, strict=True):
            if text and ids[-1:] != [self._end]:
                ids = [*ids, self._end]
            found.append((np.array(ids if text else [], dtype=np.int64), 0))
        return found

    def fingerprint(self) -> dict[str, object]:
        """Its name, and a hash of its vocabulary."""
        words = sorted(self._tokenizer.get_vocab().items())
        digest = hashlib.sha256("\0".join(f"{word}\0{number}" for word, number in words).encode())
        return {"tokenizer": self.name, "vocabulary": digest.hexdigest()}

    def arguments(self) -> list[str]:
        return ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", self.name]
