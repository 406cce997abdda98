# SPDX-License-Identifier: Apache-2.0
"""Run the GPT pretraining script and print how many rows its MLPs' first linear layers were given.

    megatron-seqpar run --nproc N tests/integration/count_rows.py ARGS

The first rank prints a line `rows of fc1: {19: 96, 20: 24}`: number of rows -> number of calls.
"""

from __future__ import annotations

import atexit
import os
import runpy
import sys
from collections import Counter
from pathlib import Path
from typing import Any

PRETRAIN = Path(__file__).parents[2] / "scripts" / "pretrain_gpt.py"


def install() -> None:
    """Count from the building of each MLP on."""
    from megatron.core.transformer.mlp import MLP

    original, rows = MLP.__init__, Counter[int]()

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.linear_fc1.register_forward_pre_hook(
            lambda module, given: rows.update([given[0].shape[0]])
        )

    MLP.__init__ = __init__
    if os.environ.get("RANK", "0") == "0":
        atexit.register(lambda: print("rows of fc1:", dict(sorted(rows.items())), flush=True))


if __name__ == "__main__":
    install()
    sys.argv[0] = str(PRETRAIN)
    sys.path.insert(0, str(PRETRAIN.parent))
    runpy.run_path(str(PRETRAIN), run_name="__main__")
