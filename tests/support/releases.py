# SPDX-License-Identifier: Apache-2.0
"""Tests that a release of megatron-core has nothing for."""

from __future__ import annotations

import os
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

from megatron_seqpar.compatibility import numbers

try:
    INSTALLED = version("megatron-core")
except PackageNotFoundError:
    INSTALLED = "0"

CHECKOUT = Path(os.environ.get("MEGATRON_LM_PATH", "/nonexistent")).absolute()
needs_checkout = pytest.mark.skipif(
    "MEGATRON_LM_PATH" not in os.environ, reason="MEGATRON_LM_PATH names no Megatron-LM checkout"
)


def at_least(family: str) -> bool:
    """Whether the installed megatron-core is of this family or newer."""
    return numbers(INSTALLED) >= numbers(family)


def since(family: str, what: str) -> pytest.MarkDecorator:
    """Skips on megatron-core before `family`, which does not have `what`."""
    return pytest.mark.skipif(
        not at_least(family), reason=f"megatron-core {INSTALLED} is older than {family}: no {what}"
    )


def checkout_version() -> str:
    """The version of megatron-core in the checkout, e.g. '0.18.2'."""
    text = (CHECKOUT / "megatron" / "core" / "package_info.py").read_text()
    found = (re.search(rf"^{name} = (\d+)", text, re.M) for name in ("MAJOR", "MINOR", "PATCH"))
    return ".".join(match[1] for match in found if match is not None)


HYBRID_SCRIPT = "pretrain_hybrid.py" if at_least("0.18") else "pretrain_mamba.py"
HYBRID_SPEC = (
    ("megatron.core.models.hybrid.hybrid_layer_specs", "hybrid_stack_spec")
    if at_least("0.18")
    else ("megatron.core.models.mamba.mamba_layer_specs", "mamba_stack_spec")
)


def hybrid_pattern(pattern: str) -> tuple[str, ...]:
    """The flags that give the layers of a hybrid model."""
    if at_least("0.17"):
        return ("--hybrid-layer-pattern", pattern)
    layers = ("--num-layers", str(len(pattern)), "--is-hybrid-model")
    return (*layers, "--hybrid-override-pattern", pattern)


def hybrid_model(config: Any, spec: Any, pattern: str, **more: Any) -> Any:
    """A hybrid model of these layers; `more` are the model's other arguments."""
    if at_least("0.18"):
        from megatron.core.models.hybrid.hybrid_model import HybridModel

        return HybridModel(config, spec, hybrid_layer_pattern=pattern, **more)
    from megatron.core.models.mamba.mamba_model import MambaModel

    config.num_layers = len(pattern)
    name = "hybrid_layer_pattern" if at_least("0.17") else "hybrid_override_pattern"
    return MambaModel(config, spec, **{name: pattern}, **more)


def local_hybrid_spec() -> Any:
    """The CPU runtime's spec of a hybrid stack."""
    from megatron_seqpar.cpu_runtime import hybrid_hooks

    if at_least("0.18"):
        return hybrid_hooks.local_hybrid_stack_spec()
    return hybrid_hooks.local_mamba_stack_spec()


def on_this_cp_rank(batch: dict[str, Any], group: Any) -> dict[str, Any]:
    """Megatron's cutting of a batch over context-parallel ranks, looked up where it is patched."""
    from megatron.core import utils

    options = {"is_hybrid_cp": False} if at_least("0.18") else {}
    found: dict[str, Any] = utils.get_batch_on_this_cp_rank(batch, cp_group=group, **options)
    return found
