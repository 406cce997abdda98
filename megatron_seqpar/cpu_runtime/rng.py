# SPDX-License-Identifier: Apache-2.0
"""Random numbers: the CUDA generator is the CPU's, since that is where CPU kernels draw from."""

from __future__ import annotations

import functools
from typing import Any

import torch

from .registry import replace, unit


@unit
def cuda_generator() -> None:
    """Megatron seeds, forks and saves CUDA generator states to control dropout and initialisation.

    Serves: core/tensor_parallel/random.py (`CudaRNGStatesTracker`, `model_parallel_cuda_manual_
    seed`, checkpointing), training/checkpointing.py (`get_rng_state`), core/rerun_state_machine.py.
    """
    generator = torch.default_generator

    def manual_seed(seed: int) -> None:
        generator.manual_seed(int(seed))

    def seed() -> None:
        generator.seed()

    for module in (torch.cuda, torch.cuda.random):
        replace(
            module,
            get_rng_state=lambda device="cuda": generator.get_state(),
            set_rng_state=lambda state, device="cuda": generator.set_state(state) and None,
            get_rng_state_all=lambda: [generator.get_state()],
            set_rng_state_all=lambda states: generator.set_state(states[0]) and None,
            manual_seed=manual_seed,
            manual_seed_all=manual_seed,
            # not the method itself: torch.compile refuses one object under two names
            initial_seed=lambda: generator.initial_seed(),
            seed=seed,
            seed_all=seed,
        )
    replace(torch.cuda, default_generators=(generator,) * max(1, torch.cuda.device_count()))


@unit
def dataloader_seed() -> None:
    """A DataLoader's iterator draws its base seed from the CPU generator: undo the draw.

    Megatron builds a DataLoader on TP rank 0 only. On a GPU that draw touches a generator that no
    dropout uses; here it is the same generator, so rank 0 would leave its TP peers and replicated
    parameters would drift apart with no error.

    Serves: training/datasets/data_samplers.py (`build_pretraining_data_loader`) under TP > 1.
    """
    from torch.utils.data.dataloader import _BaseDataLoaderIter

    original = _BaseDataLoaderIter.__init__

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        state = torch.default_generator.get_state()
        original(self, *args, **kwargs)
        torch.default_generator.set_state(state)

    replace(_BaseDataLoaderIter, __init__=__init__)
