# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys

import pytest

from megatron_seqpar.telemetry.memory import CUDA_ALLOCATED, RESIDENT, memory_use

GROWS = """
from megatron_seqpar.telemetry.memory import memory_use
before = memory_use()
block = bytearray(b"x") * (64 * 2**20)
during = memory_use()
del block
after = memory_use()
print(before.peak, during.now - before.now, after.peak - before.peak, after.kind)
"""


def test_resident_memory_keeps_its_peak() -> None:
    import os

    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", GROWS], env=environment, capture_output=True, text=True, check=True
    )
    peak, grown, peak_grown, kind = done.stdout.split(maxsplit=3)
    assert kind.strip() == RESIDENT
    assert int(peak) > 2**20
    assert int(grown) >= 60 * 2**20
    assert int(peak_grown) >= 60 * 2**20


@pytest.mark.needs_gpu
def test_allocated_memory_of_a_gpu() -> None:
    import torch

    block = torch.empty(2**20, dtype=torch.uint8, device="cuda")
    use = memory_use()
    assert use.kind == CUDA_ALLOCATED
    assert use.now >= block.nbytes
    assert use.peak >= use.now
