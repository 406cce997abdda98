# SPDX-License-Identifier: Apache-2.0
"""Switch the plugin on and off."""

from __future__ import annotations

from megatron_seqpar.compatibility import RELEASES
from megatron_seqpar.config import SeqParConfig
from megatron_seqpar.errors import SeqParError
from megatron_seqpar.integration import axis, state
from megatron_seqpar.integration.patching import Patcher

_patcher: Patcher | None = None


def install(config: SeqParConfig | None = None) -> None:
    """Patch Megatron so that it knows the sequence-parallel axis. Idempotent.

    Call it after importing `megatron.core` and before Megatron's groups and models are built;
    the launcher does. With `config` None the command line decides, and until it is parsed the
    axis is off; with a config, its values are the command line's defaults and take effect at
    once, for programs that use megatron-core without its training package.

    Raises `MissingSymbolError` when this Megatron lacks a symbol that must be replaced; nothing
    is replaced then.
    """
    global _patcher
    try:
        from megatron.core import package_info
    except ModuleNotFoundError as error:
        raise SeqParError(
            f"megatron-core is not installed: pip install 'megatron-core=={RELEASES[-1].version}'"
        ) from error
    if _patcher is None:
        # Imported late: the table imports the hooks, and some of them import Megatron.
        from megatron_seqpar.integration.patch_points import PATCH_POINTS

        _patcher = Patcher(PATCH_POINTS, package_info.__version__)
    if config is not None:
        state.set_config(config)
    if not _patcher.applied:
        _patcher.apply()
        axis.register_getters()


def uninstall() -> None:
    """Undo `install`, also in modules that took patched functions by name. Idempotent."""
    if _patcher is not None and _patcher.applied:
        _patcher.undo()
        axis.remove_getters()
    state.set_config(SeqParConfig())


def installed() -> bool:
    """Whether Megatron is patched."""
    return _patcher is not None and _patcher.applied
