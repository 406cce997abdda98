# SPDX-License-Identifier: Apache-2.0
"""The command line, `megatron-seqpar` or `python -m megatron_seqpar`."""

from __future__ import annotations

import importlib
import sys

import typer

from megatron_seqpar import __version__
from megatron_seqpar.errors import SeqParError

COMMANDS = (
    "run",
    "compare",
    "sweep",
    "bench",
    "plan",
    "schedule",
    "trace",
    "prepare_data",
    "doctor",
)
"""Modules of `megatron_seqpar.commands`, in the order that `--help` lists them.

Each has a function of its own name, or a group of commands; `CONTEXT`, where there is one, holds
settings of its parser.
"""

app = typer.Typer(
    name="megatron-seqpar",
    help="A sequence-parallel dimension for Megatron-LM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for _name in COMMANDS:
    _module = importlib.import_module(f"megatron_seqpar.commands.{_name}")
    _command = getattr(_module, _name)
    if isinstance(_command, typer.Typer):
        app.add_typer(_command, name=_name)
        continue
    _register = app.command(
        _name.replace("_", "-"), context_settings=getattr(_module, "CONTEXT", None)
    )
    _register(_command)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"megatron-seqpar {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Print the version."
    ),
) -> None:
    """A sequence-parallel dimension for Megatron-LM."""


def main() -> None:
    """Entry point: a SeqParError is one line on stderr and exit status 2."""
    try:
        app()
    except SeqParError as error:
        print(f"megatron-seqpar: error: {error}", file=sys.stderr)
        sys.exit(2)
