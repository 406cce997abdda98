# SPDX-License-Identifier: Apache-2.0
"""Options that several `bench` commands share, and how their texts are read. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import SeqParError

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}

Device = Annotated[
    str, typer.Option(help="auto, cuda or cpu; auto takes GPUs where there is one for each rank.")
]
Ranks = Annotated[
    str | None,
    typer.Option(help="Numbers of ranks, with commas; default: all GPUs up to 8, or 2 on a CPU."),
]
OneRanks = Annotated[
    int | None,
    typer.Option(min=1, help="Ranks of SP and of TP; default: all GPUs up to 8, or 2 on a CPU."),
]
NodeSize = Annotated[
    int | None, typer.Option(min=1, help="Ranks that share a node; default: what torchrun says.")
]
Tokens = Annotated[
    str | None, typer.Option(help="Sequence lengths, with commas: 4096,8K,128K. K is 1024.")
]
Rounds = Annotated[
    int, typer.Option(min=1, help="Every way once a round, in turn; medians over rounds.")
]
Kernel = Annotated[
    str | None,
    typer.Option(help="Attention kernel of all ways but stock ones; default: one of torch's own."),
]
Json = Annotated[
    Path | None, typer.Option("--json", help="Write all numbers here, with what measured them.")
]
Plot = Annotated[Path | None, typer.Option("--plot", help="Draw them in this file (.png, .svg).")]
Model = Annotated[
    str | None,
    typer.Option(help="Name of a model that comes with the package, or a YAML file of flags."),
]
Steps = Annotated[int, typer.Option(min=2, help="Training steps of a run; the first is not timed.")]
Chunks = Annotated[int, typer.Option(min=1, help="Pieces of MLPs and of the loss.")]
StockLimit = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="Leave unfused stock attention out above so many GiB; default: half the memory of "
        "this machine, or all of a GPU's.",
    ),
]
Script = Annotated[
    Path | None,
    typer.Option(help="Pretraining script; default: the one that comes with the package."),
]
Data = Annotated[
    str, typer.Option(help='stdlib (Python\'s own library) or JSON lines of {"text": ...}.')
]
Work = Annotated[Path, typer.Option(help="Folder of corpus, logs and reports.")]
Seconds = Annotated[
    float | None, typer.Option(min=1, help="Longest that one run may take; a longer one is a row.")
]
WORK = Path("runs/bench")


def numbers(text: str, option: str, least: int = 1) -> tuple[int, ...]:
    """`4096,8K` as (4096, 8192), each once and in order of size; K, M and G are powers of 1024.

    Raises SeqParError, which names `option`, for anything else and for numbers below `least`.
    """
    found = []
    for part in text.split(","):
        word = part.strip().upper()
        unit = word[-1:] if word[-1:] in ("K", "M", "G") else ""
        digits = word.removesuffix(unit)
        if not digits.isdecimal() or int(digits) * _UNITS[unit] < least:
            raise SeqParError(
                f"{option} {text}: whole numbers of at least {least} are needed, with commas; K, M "
                "and G are powers of 1024"
            )
        found.append(int(digits) * _UNITS[unit])
    return tuple(sorted(set(found)))


def number(text: str, option: str) -> int:
    """The one number of a text; SeqParError as `numbers`, and for several."""
    found = numbers(text, option)
    if len(found) > 1:
        raise SeqParError(f"{option} {text}: give one number")
    return found[0]


def words(text: str, option: str, accepted: tuple[str, ...], between: str = ",") -> list[str]:
    """The names in a text, each once. SeqParError names `option` and what it accepts."""
    found = list(dict.fromkeys(part.strip() for part in text.split(between) if part.strip()))
    for name in found:
        if name not in accepted:
            raise SeqParError(f"{option} {name}: use {f'{between} '.join(accepted)}")
    if not found:
        raise SeqParError(f"{option}: name at least one of {f'{between} '.join(accepted)}")
    return found
