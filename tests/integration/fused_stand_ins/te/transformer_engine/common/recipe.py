# SPDX-License-Identifier: Apache-2.0
"""Megatron derives a class from it at import."""


class DelayedScaling:
    """The recipe of FP8, which plain torch does not have."""
