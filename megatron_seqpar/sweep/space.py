# SPDX-License-Identifier: Apache-2.0
"""The file of a sweep: what is trained, and the space of layouts."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from megatron_seqpar.experiments.layout import RECOMPUTE, ZERO, Layout
from megatron_seqpar.experiments.setting import Section, Setting
from megatron_seqpar.mfu import Model

_AXES = ("ranks", "tp", "sp", "cp", "pp", "ep", "vpp", "micro_batch", "zero")
_Values = tuple[Any, ...]


class Grid(Section):
    """Values of every dimension; the sweep is their product.

    A name that is left out has one value, which changes nothing. `ranks` are processes in all, and
    what the axes leave of them is DP. `kernel` is auto, stock or the name of a kernel.
    """

    ranks: _Values
    seq_length: _Values
    tp: _Values = (1,)
    tp_sp: _Values = (False,)
    sp: _Values = (1,)
    cp: _Values = (1,)
    pp: _Values = (1,)
    vpp: _Values = (1,)
    ep: _Values = (1,)
    micro_batch: _Values = (1,)
    zero: _Values = (0,)
    recompute: _Values = ("none",)
    mlp_chunks: _Values = ("off",)
    loss_chunks: _Values = ("off",)
    schedule: _Values = ("auto",)
    kernel: _Values = ("auto",)

    @field_validator("*", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, (list, tuple)) else (value,)

    @field_validator(*_AXES, "seq_length")
    @classmethod
    def _whole(cls, values: _Values) -> _Values:
        for value in values:
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{value!r} is not a whole number")
        return values

    @field_validator("tp_sp")
    @classmethod
    def _switch(cls, values: _Values) -> _Values:
        if any(not isinstance(value, bool) for value in values):
            raise ValueError("the accepted values are true and false")
        return values

    @field_validator("zero")
    @classmethod
    def _stage(cls, values: _Values) -> _Values:
        return _among(values, tuple(ZERO))

    @field_validator("recompute")
    @classmethod
    def _recompute(cls, values: _Values) -> _Values:
        return _among(values, tuple(RECOMPUTE))

    @field_validator("mlp_chunks", "loss_chunks")
    @classmethod
    def _pieces(cls, values: _Values) -> _Values:
        # YAML reads a bare off as false
        return tuple("off" if value is False else str(value) for value in values)

    def points(self) -> Iterator[dict[str, Any]]:
        """Every combination, as names and values."""
        names = list(type(self).model_fields)
        for values in itertools.product(*(getattr(self, name) for name in names)):
            yield dict(zip(names, values, strict=True))


def _among(values: _Values, accepted: tuple[Any, ...]) -> _Values:
    for value in values:
        if value not in accepted:
            raise ValueError(f"{value!r}: the accepted values are {', '.join(map(str, accepted))}")
    return values


class Slurm(Section):
    """`slurm:`; see `slurm.py`. `directives` are lines after #SBATCH, `setup` lines of shell."""

    directives: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    ranks_per_node: int = Field(default=8, ge=1)
    srun: tuple[str, ...] = ("srun",)


class Space(Setting):
    """What is swept.

    Attributes:
        grid: dimensions whose product is run.
        layouts: or a list of single layouts (each a grid whose dimensions have one value or more).
        global_batch_size: sequences of a step, in all rows.
        executor: local (torchrun, one run at a time) or sbatch.
        slurm: how rows are submitted with sbatch.
        name: what the CSV's `sweep` column says; default: the file's name.
    """

    grid: Grid | None = None
    layouts: tuple[Grid, ...] = ()
    executor: Literal["local", "sbatch"] = "local"
    slurm: Slurm = Slurm()
    name: str | None = None

    @model_validator(mode="after")
    def _something(self) -> Space:
        if self.grid is None and not self.layouts:
            raise ValueError("give grid or layouts")
        return self

    def points(self, kernel: str, model: Model) -> tuple[list[Point], Counter[str]]:
        """All rows, without doubles, in order, and why combinations of the grid are not among them.

        A product of dimensions always holds combinations that cannot be, and they are left out and
        counted; a layout that was listed is a row, possible or not. `kernel` is what `auto` stands
        for.
        """
        found: dict[Point, None] = {}
        left_out: Counter[str] = Counter()
        for grid in ((self.grid,) if self.grid else ()) + self.layouts:
            for values in grid.points():
                length = values.pop("seq_length")
                if values["kernel"] == "auto":
                    values["kernel"] = kernel
                layout = _simplest(Layout(**values))
                why = layout.impossible(model, self.global_batch_size)
                if why and grid is self.grid:
                    left_out[why] += 1
                else:
                    found.setdefault(Point(length, layout))
        return list(found), left_out


@dataclass(frozen=True)
class Point:
    """One row: a sequence length and a layout."""

    sequence_length: int
    layout: Layout


def _simplest(layout: Layout) -> Layout:
    """`layout` without choices that change nothing: a schedule without SP is none."""
    return replace(layout, schedule="auto") if layout.sp == 1 else layout
