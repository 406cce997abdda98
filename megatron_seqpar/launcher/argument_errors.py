# SPDX-License-Identifier: Apache-2.0
"""Command-line errors and help of the script, where argparse would be unreadable or fail.

A wrong flag makes argparse print the usage first: 400 lines of it for Megatron, from every rank.
And Megatron 0.19's help texts hold percent signs that argparse cannot format, so `--help` crashes.
"""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from .failures import rank_prefix, say

_UNKNOWN = re.compile(r"unrecognized arguments: (--?[\w-]+)")


def short_argument_errors() -> None:
    """From now on argparse reports an error in one line with the nearest flag."""

    def error(self: argparse.ArgumentParser, message: str) -> NoReturn:
        say(f"{rank_prefix()} error: {with_hint(self, message)}")
        raise SystemExit(2)

    argparse.ArgumentParser.error = error  # type: ignore[method-assign]


def with_hint(parser: argparse.ArgumentParser, message: str) -> str:
    """argparse's message with the flag of `parser` that is nearest to one it does not know."""
    unknown = _UNKNOWN.search(message)
    near: list[str] = []
    if unknown is not None:
        near = difflib.get_close_matches(unknown[1], parser._option_string_actions, n=1)
    return message + (f"; did you mean {near[0]}?" if near else "; --help lists what there is")


def tolerant_help() -> None:
    """From now on a help text that argparse cannot format is shown as it is written."""
    original = argparse.HelpFormatter._expand_help

    def _expand_help(self: argparse.HelpFormatter, action: argparse.Action) -> Any:
        try:
            return original(self, action)
        except (ValueError, TypeError, KeyError):
            return action.help or ""

    argparse.HelpFormatter._expand_help = _expand_help  # type: ignore[method-assign]


def asks_for_help(args: Sequence[str]) -> bool:
    """Whether the script's arguments ask for its help."""
    return "--help" in args or "-h" in args
