# SPDX-License-Identifier: Apache-2.0
"""The file of a comparison."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from megatron_seqpar.experiments.layout import RECOMPUTE
from megatron_seqpar.experiments.setting import Section, Setting


class WaySection(Section):
    """One way of `ways:`, in the place of those that compare makes by itself.

    Attributes:
        label: its name in the table; made of the layout when not given.
        ranks: processes; default: the file's.
        tp, sp, cp, pp, tp-sp: the parallel layout.
        kernel: stock, auto (the file's) or the name of a kernel.
        recompute: default: the file's.
        arguments: more flags, for this way alone.
    """

    label: str | None = None
    ranks: int | None = Field(default=None, ge=1)
    tp: int = Field(default=1, ge=1)
    sp: int = Field(default=1, ge=1)
    cp: int = Field(default=1, ge=1)
    pp: int = Field(default=1, ge=1)
    tp_sp: bool = False
    kernel: str = "auto"
    recompute: str | None = None
    schedule: str = "auto"
    mlp_chunks: str = "off"
    loss_chunks: str = "off"
    arguments: dict[str, Any] = Field(default_factory=dict)

    @field_validator("recompute")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        return value if value is None else known_recompute(value)

    @field_validator("mlp_chunks", "loss_chunks", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return "off" if value is False else str(value)  # YAML reads a bare off as false


class LongestSection(Section):
    """`longest:` searches the longest sequence that each way trains.

    Attributes:
        memory_mib: on a CPU, what a rank may take once training begins.
        start, most: the first and the last length tried.
        precision: where to stop halving, relative.
        seconds: longest run; a way that needs more is reported as "at least".
    """

    memory_mib: int = Field(default=512, ge=1)
    start: int = Field(default=1024, ge=1)
    most: int = Field(default=2**20, ge=1)
    precision: float = Field(default=0.1, gt=0)
    seconds: float = Field(default=240.0, gt=0)


class CompareConfig(Setting):
    """What is compared.

    Attributes:
        ranks: processes of every way but those on one rank.
        seq_length: tokens of a sequence; each of several is a comparison by itself.
        micro_batch_size: sequences of a micro-batch.
        recompute: of all ways: none, selective, full, or one of the plugin's.
        longest: also search the longest sequence that each way trains.
        ways: which ways; default: SP, TP, TP-SP, mixes and CP of these ranks, and one rank.
    """

    ranks: int = Field(default=2, ge=1)
    seq_length: tuple[int, ...]
    micro_batch_size: int = Field(default=1, ge=1)
    recompute: str = "none"
    ways: tuple[WaySection, ...] | None = None
    longest: LongestSection | None = None

    @field_validator("seq_length", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, int) else value

    @field_validator("seq_length")
    @classmethod
    def _positive(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or min(value) < 1:
            raise ValueError("one length or more is needed, each above 0")
        return value

    @field_validator("recompute")
    @classmethod
    def _known(cls, value: str) -> str:
        return known_recompute(value)


def known_recompute(value: str) -> str:
    """`value`, or ValueError with the accepted ones."""
    if value not in RECOMPUTE:
        raise ValueError(f"the accepted values are {', '.join(RECOMPUTE)}")
    return value
