# SPDX-License-Identifier: Apache-2.0
"""Transformer Engine by name, in plain torch; Megatron asks for its version first."""

from . import common, pytorch

__version__ = "2.2.0"
__all__ = ["__version__", "common", "pytorch"]
