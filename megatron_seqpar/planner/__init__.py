# SPDX-License-Identifier: Apache-2.0
"""Which parallel layout, before anyone pays for GPUs. Pure Python: no torch, no Megatron.

layout.py         a parallel layout with its batch, and what makes one impossible
hardware.py       a cluster: its description, the memory of a rank, the constants
constants.py      the free constants of the model, with priors
sizes.py          weights and widths of one rank
memory.py         bytes of a rank of each pipeline stage, by component
attention.py      seconds of attention, by kernel, alone or over the SP axis
compute.py        seconds of the rest of a layer, of the LM head and the optimizer
communication.py  seconds of collectives of the other axes
estimate.py       estimate(): all of that for one layout
ranking.py        the order of layouts
search.py         search(): all layouts of a number of ranks
launch.py         the command that starts one
model_file.py     models from files
constants_file.py clusters from files
runs.py           measured runs from CSV
fit.py            calibrate(): the constants from measured runs
validate.py       predictions against measured runs
lightseq.py       the comparisons of the DISTFLASHATTN paper, simulated
"""

from ..mfu import Model
from .constants import Basis, Constants
from .estimate import Estimate, StepTime, estimate
from .hardware import Cluster
from .layout import Layout
from .memory import Memory
from .search import Found, search

__all__ = [
    "Basis",
    "Cluster",
    "Constants",
    "Estimate",
    "Found",
    "Layout",
    "Memory",
    "Model",
    "StepTime",
    "estimate",
    "search",
]
