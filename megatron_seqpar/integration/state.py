# SPDX-License-Identifier: Apache-2.0
"""The settings the installed patches act on.

One value, set by `install()` and then by the parsed command line, read by every hook at call
time. A hook that finds the axis inactive calls the stock function, so an installed plugin with
`--sequence-parallel-size 1` leaves every result of Megatron as it was.
"""

from __future__ import annotations

from megatron_seqpar.config import SeqParConfig

_config = SeqParConfig()


def config() -> SeqParConfig:
    """The settings in force."""
    return _config


def set_config(config: SeqParConfig) -> None:
    """Replace the settings in force."""
    global _config
    _config = config


def active() -> bool:
    """Whether the SP axis has more than one rank."""
    return _config.active


def contiguous() -> bool:
    """Whether ranks own one chunk each, where stock context parallelism gives them a pair.

    With the zigzag token layout stock code cuts, numbers and rolls tokens as it always does.
    """
    return _config.active and _config.token_layout == "contiguous"
