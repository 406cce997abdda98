# SPDX-License-Identifier: Apache-2.0
"""`megatron-seqpar doctor`: what this machine has, what is wrong with it, and what mends it.

finding.py      what a check answers, and what the user asked about
machine.py      what checks look at, looked at once
probe_child.py  imports torch, kernels and Megatron in a process of its own, which may die of it
causes.py       failures that follow from others
folders.py      caches of compilers
tested.py       the versions that the project is tested with
checks/         one question a file
self_test.py    one rank of the self-test of numerics

Nothing here imports torch or Megatron in the doctor's own process: it must be able to say that they
are broken.
"""

from .checks import CHECKS, examine
from .finding import Asked, Finding, Status

__all__ = ["CHECKS", "Asked", "Finding", "Status", "examine"]
