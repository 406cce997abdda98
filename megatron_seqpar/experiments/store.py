# SPDX-License-Identifier: Apache-2.0
"""Rows of an experiment on disk: one JSON file a job, whole or not there.

A row is written beside its place and moved there, so that a kill at any moment leaves what was
finished and nothing else. The folder's lock is held while a job runs: two commands on one folder
take turns, and each finds what the other finished. The system drops the lock with its holder.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FORMAT = 1


class Store:
    """The rows in `folder`, which is made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "rows").mkdir(parents=True, exist_ok=True)

    def place(self, name: str, key: str) -> Path:
        """The folder of a job's log and report."""
        return self.folder / "runs" / f"{slug(name)}-{key[:10]}"

    def _row(self, name: str, key: str) -> Path:
        return self.folder / "rows" / f"{slug(name)}-{key[:10]}.json"

    def find(self, name: str, key: str) -> dict[str, Any] | None:
        """The row of a finished job, else None."""
        try:
            row = json.loads(self._row(name, key).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except json.JSONDecodeError:  # not ours: a row is never there in part
            return None
        same = row.get("format") == FORMAT and row.get("key") == key
        return dict(row) if same else None

    def save(self, name: str, key: str, row: dict[str, Any]) -> dict[str, Any]:
        """Write a finished job's row; what `find` will return."""
        whole = {"format": FORMAT, "key": key, **row}
        write_whole(self._row(name, key), json.dumps(whole, indent=1) + "\n")
        return whole

    @contextmanager
    def turn(self, waiting: Callable[[str], None]) -> Iterator[None]:
        """Hold the folder's lock; `waiting` is told when another command has it."""
        with (self.folder / "lock").open("a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                waiting(
                    f"another command ({file.read().strip() or 'unknown'}) runs a job in "
                    f"{self.folder}: waiting for it"
                )
                fcntl.flock(file, fcntl.LOCK_EX)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
            file.flush()
            yield  # closing the file drops the lock


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is there wholly or as it was before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def save_picture(figure: Any, path: Path) -> None:
    """Save a matplotlib figure as a PNG, wholly; two commands may do so at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial.png")
    try:
        figure.savefig(partial, dpi=110)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def slug(name: str) -> str:
    """A label as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:80] or "run"
