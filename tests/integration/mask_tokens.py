# SPDX-License-Identifier: Apache-2.0
"""Run a pretraining script with its loss mask gathered in one place.

    megatron-seqpar run --nproc N tests/integration/mask_tokens.py FRACTION SCRIPT ARGS

The first FRACTION of every sequence does not count, as a prompt would not. With an SP axis those
are all the tokens of some ranks, and another number in every sample.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any


def install(fraction: float) -> None:
    """Mask the first `fraction` of each sample, a little more in every second one."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, MockGPTDataset

    for dataset in (GPTDataset, MockGPTDataset):
        if "__getitem__" in vars(dataset):
            _mask(dataset, fraction)


def _mask(dataset: type, fraction: float) -> None:
    original = dataset.__getitem__

    def __getitem__(self: Any, index: int) -> dict[str, Any]:
        sample = original(self, index)
        mask = sample["loss_mask"].clone()
        # megatron asks for a sample without an index where it pads an incomplete batch
        mask[: int(fraction * mask.numel()) + 7 * ((index or 0) % 2)] = 0
        return {**sample, "loss_mask": mask}

    dataset.__getitem__ = __getitem__


if __name__ == "__main__":
    fraction, script, *rest = sys.argv[1:]
    install(float(fraction))
    sys.argv = [script, *rest]
    sys.path.insert(0, str(Path(script).absolute().parent))
    runpy.run_path(script, run_name="__main__")
