# SPDX-License-Identifier: Apache-2.0
"""Fused operations by name, which older Megatrons annotate with; none is made unless asked for."""


class FusibleOperation:
    """One operation."""


class Sequential:
    """Several."""
