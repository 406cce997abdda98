# SPDX-License-Identifier: Apache-2.0
"""A sequence-parallel dimension for Megatron-LM.

Importing this package changes nothing and imports neither torch nor Megatron.
"""

__version__ = "0.9.0"
