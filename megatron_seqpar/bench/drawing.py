# SPDX-License-Identifier: Apache-2.0
"""What all pictures share: a figure without a screen, an axis of lengths, a file written whole."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import SeqParError


def figure(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Any, Any]:
    """A figure of `size` inches a panel and its grid of axes, `grid[row][column]`."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    return made, made.subplots(rows, columns, squeeze=False, **options)


def powers(axes: Any, values: Sequence[int], label: str, names: Sequence[str]) -> None:
    """A logarithmic x axis with a tick at each of `values`."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(values), list(names))
    axes.tick_params(axis="x", labelsize=8)
    axes.xaxis.minorticks_off()
    axes.set_xlabel(label)
    axes.grid(alpha=0.3)


def logarithmic(axes: Any) -> None:
    """A logarithmic y axis with plain numbers at 1, 2 and 5, also where it spans no power of 10."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def tokens(axes: Any, lengths: Sequence[int]) -> None:
    """An x axis of sequence lengths."""
    powers(axes, lengths, "tokens a sequence", [f"{length:,}" for length in lengths])


def legend(figure: Any, axes: Sequence[Any], columns: int = 3) -> None:
    """One legend below all panels, each name once."""
    found: dict[str, Any] = {}
    for one in axes:
        for handle, name in zip(*one.get_legend_handles_labels(), strict=True):
            found.setdefault(name, handle)
    figure.legend(
        list(found.values()), list(found), loc="outside lower center",
        ncols=min(columns, len(found) or 1), fontsize=8, frameon=False,
    )  # fmt: skip


def save(figure: Any, path: Path) -> None:
    """Write the picture, whole or not at all; the format is the name's (.png, .svg, .pdf)."""
    partial = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            figure.savefig(partial, dpi=130)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise SeqParError(f"--plot {path}: cannot be written: {error}") from None
