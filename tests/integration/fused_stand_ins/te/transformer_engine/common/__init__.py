# SPDX-License-Identifier: Apache-2.0
from . import recipe

__all__ = ["recipe"]
