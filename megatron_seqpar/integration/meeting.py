# SPDX-License-Identifier: Apache-2.0
"""Ranks that tell rank 0 something without a collective.

They write to the store through which torch.distributed's groups were made. A rank that never comes
is missed, and after some seconds no longer waited for: what is only told at the end of a run must
not hang it, and takes no memory of a GPU.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

PATIENCE_SECONDS = 30.0
_POLL_SECONDS = 0.02


def together(label: str, patience: float = PATIENCE_SECONDS) -> bool:
    """Wait until every rank has come to `label`; False if some had not after `patience` seconds.

    A label serves once a run.
    """
    _, world, store = _place()
    if world == 1:
        return True
    key = f"seqpar/{label}/here"
    store.add(key, 1)
    return _until(lambda: int(store.add(key, 0)) >= world, patience)


def gather(
    label: str, record: dict[str, Any], patience: float = PATIENCE_SECONDS
) -> list[dict[str, Any]] | None:
    """Every rank's record, on rank 0 in order of ranks; None elsewhere, which do not wait.

    Records hold what JSON can. Those that did not come in `patience` seconds are left out. A label
    serves once a run.
    """
    rank, world, store = _place()
    if world == 1:
        return [record]
    if rank != 0:
        store.set(f"seqpar/{label}/{rank}", json.dumps(record))
        return None
    keys = [f"seqpar/{label}/{rank}" for rank in range(1, world)]
    whole = _until(lambda: bool(store.check(keys)), patience)
    came = keys if whole else [key for key in keys if store.check([key])]
    return [record, *(json.loads(store.get(key)) for key in came)]


def _until(reached: Callable[[], bool], patience: float) -> bool:
    end = time.monotonic() + patience
    while not reached():
        if time.monotonic() > end:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def _place() -> tuple[int, int, Any]:
    """(this rank, ranks that can be met, the store); of one rank alone there is nothing to store.

    torch has no public way to the store of the default groups; this one has been there since 1.8.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1 or dist.get_backend() == "fake":
        return 0, 1, None
    return dist.get_rank(), dist.get_world_size(), dist.distributed_c10d._get_default_store()
