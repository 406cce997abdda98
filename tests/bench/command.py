# SPDX-License-Identifier: Apache-2.0
"""Runs `megatron-seqpar bench ...` in this process, its ranks and runs in others."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from megatron_seqpar.cli import app
from megatron_seqpar.errors import SeqParError


def invoke(*arguments: str | Path, **variables: str) -> tuple[str, BaseException | None]:
    """What a command prints, and how it failed."""
    cleared = {"RANK": None, "WORLD_SIZE": None, "LOCAL_WORLD_SIZE": None, **variables}
    done = CliRunner().invoke(app, ["bench", *map(str, arguments)], env=cleared)
    return done.output, done.exception


def bench(*arguments: str | Path) -> str:
    """What a command prints; it succeeds."""
    output, failure = invoke(*arguments)
    if failure is not None:
        raise failure
    return output


def refused(*arguments: str | Path, **variables: str) -> str:
    """What a command says that refuses its options."""
    _, failure = invoke(*arguments, **variables)
    assert isinstance(failure, SeqParError), failure
    return str(failure)
