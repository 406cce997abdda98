# SPDX-License-Identifier: Apache-2.0
"""Runs Megatron's own training loop in a process that has no GPU.

CUDA device names mean the CPU, NCCL means gloo, streams and events do nothing. Opt-in: importing
this package changes nothing and imports neither torch nor Megatron; `activate()` does, once, and
refuses where there is a GPU. It finds errors of logic, not of stream order, NCCL or speed.

    arguments.py       Megatron flags that a CPU needs, and those it cannot serve
    activation.py      activate(): checks, environment, units in order
    registry.py        what a unit is
    devices.py         factories, .to, .cuda, .type, torch.load
    presence.py        torch.cuda answers as one device; torch.accelerator as none
    streams.py         inert streams and events
    memory.py          memory numbers from the process's resident memory
    rng.py             one random generator
    collectives.py     gloo for NCCL
    optimizer.py       FusedAdam in plain torch
    megatron_hooks.py  norm under TP-SP, JIT warm-up, triton
    hybrid_hooks.py    HybridModel of local modules
    import_hooks.py    run code after a module's first import
    child.py, site/    child processes
"""

from .activation import activate, is_active, share_cores, units
from .arguments import cpu_arguments

__all__ = ["activate", "cpu_arguments", "is_active", "share_cores", "units"]
