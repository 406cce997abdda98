# SPDX-License-Identifier: Apache-2.0
"""Every setting of the plugin, in one frozen dataclass.

Each field carries the command line flag it is generated from, its help text and its choices, so
that a flag, its default and its documentation cannot drift apart. Nothing here imports torch or
Megatron: the dataclass is what the launcher, the integration and the tests hand around, and its
values are plain Python types because Megatron pickles its argument namespace into checkpoints.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any

from megatron_seqpar.errors import UnsupportedError

GROUP_TITLE = "sequence parallel (megatron_seqpar)"


def _flag(
    default: Any,
    flag: str,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    metavar: str | None = None,
    negated: bool = False,
) -> Any:
    """A dataclass field with the metadata that `add_arguments` reads."""
    metadata = {
        "flag": flag,
        "help": help,
        "choices": choices,
        "metavar": metavar,
        "negated": negated,
    }
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class SeqParConfig:
    """Settings of the sequence-parallel (SP) axis.

    Raises `UnsupportedError` when a value is not one of its choices or a size is below 1.
    Kernel names are checked where the kernels are known, in `megatron_seqpar.attention`.
    """

    sequence_parallel_size: int = _flag(
        1,
        "--sequence-parallel-size",
        "Number of ranks over which each sequence is split into contiguous chunks. "
        "1 leaves Megatron as it is. Not to be confused with --sequence-parallel, which splits "
        "norm and dropout activations over the tensor-parallel group.",
        metavar="N",
    )
    schedule: str = _flag(
        "auto",
        "--seqpar-schedule",
        "Who computes which attention tile when, and what moves. 'balanced' leaves no rank idle "
        "under a causal mask; 'ring' is the baseline; 'auto' chooses.",
        choices=("auto", "balanced", "ring"),
    )
    kernel: str = _flag(
        "auto",
        "--seqpar-kernel",
        "Attention kernel. 'auto' takes the best one for the device, dtype and head dimension; "
        "a named one is used or refused, never replaced. Naming one with "
        "--sequence-parallel-size 1 uses it as Megatron's core attention.",
        metavar="NAME",
    )
    recompute: str = _flag(
        "none",
        "--seqpar-recompute",
        "'attention-output' repeats each layer in backward except its attention, whose output "
        "is kept; it takes the place of Megatron's --recompute-granularity.",
        choices=("none", "attention-output"),
    )
    overlap: bool = _flag(
        True,
        "--seqpar-no-overlap",
        "Wait for every transfer before computing. For measurement: it is slower and gives the "
        "same numbers.",
        negated=True,
    )
    report: str | None = _flag(
        None,
        "--seqpar-report",
        "Write losses, gradient norms, step times, peak memory and bytes sent of the run to this "
        "JSON file.",
        metavar="FILE.json",
    )

    def __post_init__(self) -> None:
        if self.sequence_parallel_size < 1:
            raise UnsupportedError(
                f"--sequence-parallel-size {self.sequence_parallel_size}: the size must be 1 or "
                "more; 1 turns the axis off."
            )
        for field in dataclasses.fields(self):
            choices = field.metadata["choices"]
            value = getattr(self, field.name)
            if choices is not None and value not in choices:
                raise UnsupportedError(
                    f"{field.metadata['flag']} {value}: unknown value. Use one of: "
                    f"{', '.join(choices)}."
                )

    @property
    def active(self) -> bool:
        """Whether the axis has more than one rank."""
        return self.sequence_parallel_size > 1

    @property
    def replaces_core_attention(self) -> bool:
        """Whether Megatron's core attention gives way to ours.

        With one rank that happens when a kernel is named, so that size 1 and stock tensor
        parallelism can be compared with the axis on the very same attention kernel, and when our
        recomputation is asked for, which needs what our attention returns.
        """
        return self.active or self.kernel != "auto" or self.recompute != "none"


def destination(field_name: str) -> str:
    """The argparse destination of a field: its own name for the size, `seqpar_*` for the rest."""
    return field_name if field_name == "sequence_parallel_size" else f"seqpar_{field_name}"


def add_arguments(
    parser: argparse.ArgumentParser, defaults: SeqParConfig | None = None
) -> argparse.ArgumentParser:
    """Add one flag a field to `parser`, under a group of their own; returns the parser.

    Choices are stated in the help text and checked by `SeqParConfig`, not by argparse, whose
    error would print Megatron's whole usage.
    """
    defaults = defaults or SeqParConfig()
    group = parser.add_argument_group(title=GROUP_TITLE)
    for field in dataclasses.fields(SeqParConfig):
        meta: Mapping[str, Any] = field.metadata
        default = getattr(defaults, field.name)
        keywords: dict[str, Any] = {
            "dest": destination(field.name),
            "default": default,
            "help": meta["help"],
        }
        if meta["negated"]:
            keywords["action"] = "store_false"
        else:
            # A wrong number is reported by `from_namespace`, like every other wrong value.
            keywords["type"] = str
            keywords["metavar"] = meta["metavar"]
            if meta["choices"] is not None:
                keywords["metavar"] = "{" + ",".join(meta["choices"]) + "}"
        group.add_argument(meta["flag"], **keywords)
    return parser


def from_namespace(namespace: Any) -> SeqParConfig:
    """The config that parsed arguments ask for.

    Raises `UnsupportedError` for values outside a field's choices.
    """
    values = {
        field.name: getattr(namespace, destination(field.name))
        for field in dataclasses.fields(SeqParConfig)
        if hasattr(namespace, destination(field.name))
    }
    size = values.get("sequence_parallel_size", 1)
    try:
        values["sequence_parallel_size"] = int(size)
    except ValueError:
        raise UnsupportedError(
            f"--sequence-parallel-size {size}: not a number. Use 1 or more."
        ) from None
    return SeqParConfig(**values)
