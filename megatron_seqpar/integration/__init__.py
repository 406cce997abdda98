# SPDX-License-Identifier: Apache-2.0
"""Where the SP axis meets Megatron: thin adapters, one file a hook.

    install       switch everything on and off
    patch_points  the table of replaced symbols; patching applies and undoes it
    arguments     flags, folding into context_parallel_size; refusals and lengths check
    axis          process group, getters, ProcessGroupCollection.sp
    batch, rotary, roll, mamba   contiguous tokens where stock code pairs chunks
    core_attention, spec         our attention in any layer spec, audited after the build
    loss          exact averages over the axis
    state         the settings in force

Importing this package changes nothing; `install()` does, once, and `uninstall()` takes it back.
"""

from megatron_seqpar.integration.install import install, installed, uninstall

__all__ = ["install", "installed", "uninstall"]
