# SPDX-License-Identifier: Apache-2.0
"""Where the SP axis meets Megatron: thin adapters, one file a hook.

    install       switch everything on and off
    patch_points  the table of replaced symbols; patching applies and undoes it
    arguments     flags, folding into context_parallel_size; refusals and lengths check
    axis          process group, getters, ProcessGroupCollection.sp
    batch, rotary, roll, mamba   contiguous tokens where stock code pairs chunks
    core_attention, spec         our attention in any layer spec, audited after the build
    recompute, recompute_parts   layers run again in backward, their attention never
    mlp, lm_head  MLPs, logits and loss in pieces of the sequence; memory_plan chooses how many
    offload       what recomputation keeps, in host memory
    loss          exact averages over the axis
    state         the settings in force

Importing this package changes nothing; `install()` does, once, and `uninstall()` takes it back.
"""

from megatron_seqpar.integration.install import install, installed, uninstall

__all__ = ["install", "installed", "uninstall"]
