# SPDX-License-Identifier: Apache-2.0
"""Model FLOPs utilization: one formula for the training log, compare, sweep and the planner.

`Model` says what is trained, `flops` what a step of it counts for, `peak` what a device could do.
Pure Python: no torch, no Megatron.
"""

from .flops import model_flops, utilization
from .model import Model, Window, load_model, model_from_flags, read_flags
from .peak import Peak, peak_of

__all__ = [
    "Model",
    "Peak",
    "Window",
    "load_model",
    "model_flops",
    "model_from_flags",
    "peak_of",
    "read_flags",
    "utilization",
]
