# SPDX-License-Identifier: Apache-2.0
"""Where the text of a corpus comes from.

A source yields documents in a fixed order and states a fingerprint: two sources with the same
fingerprint yield the same documents.
"""

import json
import os
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from megatron_seqpar.errors import SeqParError


@dataclass(frozen=True)
class Document:
    """One document. `position` of its source's `size` bytes had been read at its end."""

    name: str
    text: str
    position: int


class Source(Protocol):
    """Documents in a fixed order."""

    @property
    def size(self) -> int:
        """Bytes to read, for a progress bar."""

    def fingerprint(self) -> dict[str, object]:
        """Plain values that change when the documents may have changed."""

    def documents(self) -> Iterator[Document]:
        """The documents, in order."""


class StandardLibrary:
    """The source of a Python standard library: long documents that every machine has.

    One document a package, its files in reading order: `__init__.py`, the package's modules by
    name, then its sub-packages the same way. Top-level modules that belong to no package are
    gathered by initial letter (`_pydecimal` goes with p). Tests and installed packages are left
    out. Each file starts with a line that names it, so that a model can see where it is.
    """

    SKIPPED = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})

    def __init__(self, root: str | os.PathLike[str] | None = None) -> None:
        self.root = Path(root or sysconfig.get_paths()["stdlib"])
        self._groups = self._group()
        if not self._groups:
            raise SeqParError(
                f"{self.root} holds no Python source to build a corpus from; give your own text "
                "with --input FILE.jsonl"
            )

    @property
    def size(self) -> int:
        return sum(path.stat().st_size for files in self._groups.values() for path in files)

    def fingerprint(self) -> dict[str, object]:
        return {
            "source": "standard library",
            "python": sys.version.split()[0],
            "root": str(self.root),
            "files": sum(len(files) for files in self._groups.values()),
            "bytes": self.size,
        }

    def documents(self) -> Iterator[Document]:
        position = 0
        for name, files in self._groups.items():
            parts = []
            for path in files:
                raw = path.read_bytes()
                position += len(raw)
                # A few files are in old encodings; what UTF-8 cannot read is not worth keeping.
                text = raw.decode("utf-8", errors="ignore")
                parts.append(f"# file: {path.relative_to(self.root).as_posix()}\n{text}\n")
            yield Document(name, "".join(parts), position)

    def _group(self) -> dict[str, list[Path]]:
        modules: dict[str, list[Path]] = {}
        packages: dict[str, list[Path]] = {}
        for entry in sorted(self.root.iterdir()) if self.root.is_dir() else []:
            if entry.suffix == ".py":
                letter = (entry.stem.lstrip("_") or "_")[0].lower()
                modules.setdefault(f"modules {letter}", []).append(entry)
            elif self._is_package(entry):
                packages[entry.name] = list(self._reading_order(entry))
        return dict(sorted(modules.items())) | packages

    def _is_package(self, folder: Path) -> bool:
        named_well = folder.name.isidentifier() and folder.name not in self.SKIPPED
        return named_well and (folder / "__init__.py").is_file()

    def _reading_order(self, package: Path) -> Iterator[Path]:
        entries = sorted(package.iterdir())
        yield package / "__init__.py"
        yield from (e for e in entries if e.suffix == ".py" and e.name != "__init__.py")
        for entry in entries:
            if entry.is_dir() and self._is_package(entry):
                yield from self._reading_order(entry)


class JsonLines:
    """A file with one JSON object a line, the text under one key.

    Blank lines are passed over. Anything else that is not an object with a string under `key`
    raises SeqParError with the line's number.
    """

    def __init__(self, path: str | os.PathLike[str], key: str = "text") -> None:
        self.path = Path(path)
        self.key = key
        if not self.path.is_file():
            raise SeqParError(f"--input {self.path}: no such file")

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    def fingerprint(self) -> dict[str, object]:
        stat = self.path.stat()
        return {
            "source": "json lines",
            "path": str(self.path.resolve()),
            "key": self.key,
            "bytes": stat.st_size,
            "modified_ns": stat.st_mtime_ns,
        }

    def documents(self) -> Iterator[Document]:
        position = 0
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                position += len(line)
                if line.strip():
                    yield Document(f"line {number}", self._text(line, number), position)

    def _text(self, line: bytes, number: int) -> str:
        where = f"{self.path}, line {number}"
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise SeqParError(f"{where}: not UTF-8 text ({error.reason})") from error
        except json.JSONDecodeError as error:
            raise SeqParError(
                f"{where}: not valid JSON ({error.msg} at column {error.colno}); each line must be "
                f'one object such as {{"{self.key}": "..."}}'
            ) from error
        if not isinstance(record, dict):
            raise SeqParError(
                f"{where}: a JSON {type(record).__name__} where an object is expected, such as "
                f'{{"{self.key}": "..."}}'
            )
        if self.key not in record:
            raise SeqParError(
                f"{where}: no key {self.key!r}; the keys are {sorted(record)}; choose one with "
                "--json-key"
            )
        text = record[self.key]
        if not isinstance(text, str):
            raise SeqParError(
                f"{where}: the value under {self.key!r} is a {type(text).__name__}, not a string"
            )
        return text
