# SPDX-License-Identifier: Apache-2.0
"""The settings the installed patches act on.

One value, set by `install()` and then by the parsed command line, read by every hook at call
time. A hook that finds the axis inactive calls the stock function, so an installed plugin with
`--sequence-parallel-size 1` leaves every result of Megatron as it was.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_seqpar.config import SeqParConfig, as_typed, chunk_count
from megatron_seqpar.errors import UnsupportedError


@dataclass(frozen=True)
class ChosenChunks:
    """What `auto` chose: pieces of the sequence for MLPs and for the loss, 0 for off."""

    mlp: int
    loss: int


_config = SeqParConfig()
_chosen: ChosenChunks | None = None


def config() -> SeqParConfig:
    """The settings in force."""
    return _config


def set_config(config: SeqParConfig) -> None:
    """Replace the settings in force."""
    global _config, _chosen
    _config, _chosen = config, None


def context(config: SeqParConfig) -> str:
    """How refusals name what turned our attention on."""
    if config.active or config.reason_without_axis is None:
        return as_typed(config, "sequence_parallel_size")
    return config.reason_without_axis


def active() -> bool:
    """Whether the SP axis has more than one rank."""
    return _config.active


def contiguous() -> bool:
    """Whether ranks own one chunk each, where stock context parallelism gives them a pair.

    With the zigzag token layout stock code cuts, numbers and rolls tokens as it always does.
    """
    return _config.active and _config.token_layout == "contiguous"


def set_chosen(chosen: ChosenChunks) -> None:
    """Put `auto`'s choice into force, until the settings change."""
    global _chosen
    _chosen = chosen


def mlp_chunks() -> int:
    """Pieces of the sequence that MLPs are computed in; 0: as stock code does, 1: recomputed whole.

    Raises `UnsupportedError` for auto before anything has chosen.
    """
    asked = chunk_count(_config, "mlp_chunks")
    return _automatic("mlp_chunks").mlp if asked is None else asked


def loss_chunks() -> int:
    """Pieces of the sequence that logits and loss are computed in; 0: as stock code does.

    Raises `UnsupportedError` for auto before anything has chosen.
    """
    asked = chunk_count(_config, "loss_chunks")
    return _automatic("loss_chunks").loss if asked is None else asked


def _automatic(name: str) -> ChosenChunks:
    if _chosen is None:
        raise UnsupportedError(
            f"{as_typed(_config, name)}: auto chooses by the arguments of Megatron's training "
            "loop, and this model is built without them. Give a number or off."
        )
    return _chosen
