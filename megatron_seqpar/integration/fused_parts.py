# SPDX-License-Identifier: Apache-2.0
"""Which fused norms and linear layers the run has, in a line on rank 0 before the first step.

Megatron's layer specs take Transformer Engine's parts with `--transformer-impl
transformer_engine` and, in local layers, Apex's LayerNorm where it is installed; the plugin swaps
core attention alone and keeps the rest. Their absence costs speed and memory and is easily
overlooked: Megatron warns among many other lines, or not at all.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from typing import Any

from megatron_seqpar.errors import UnsupportedError

ENGINE = "transformer_engine"
WITHOUT = (
    "--no-rope-fusion",
    "--no-persist-layer-norm",
    "--no-gradient-accumulation-fusion",
    "--no-masked-softmax-fusion",
)
"""What Megatron must be told where neither Transformer Engine nor Apex is installed."""


def _version(module: str, distributions: tuple[str, ...]) -> str | None:
    """The version of an importable module, '' where it says none; None where it is not there."""
    if importlib.util.find_spec(module) is None:
        return None
    stated = getattr(sys.modules.get(module), "__version__", None)
    if stated is not None:
        return str(stated)
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def line(implementation: str) -> str:
    """What layers are made of. implementation: Megatron's `transformer_impl`."""
    engine = _version(ENGINE, ("transformer-engine", "transformer_engine"))
    apex = _version("apex", ("apex",))
    if implementation == ENGINE:
        made = "norms and linear layers are Transformer Engine's"
    else:
        norm = "torch's" if apex is None else "torch's RMSNorm or Apex's LayerNorm"
        made = f"linear layers are Megatron's, norms {norm}"
    there = "is not installed" if engine is None else f"{engine} is installed".lstrip()
    also = "is not installed" if apex is None else "is installed"
    return f"seqpar: {made}; Transformer Engine {there}, Apex {also}"


def check(args: Any) -> None:
    """Say on rank 0 what layers are made of. args: Megatron's validated arguments.

    Raises `UnsupportedError` for Transformer Engine's stock layers where it is not installed: what
    Megatron says then is that something is not callable.
    """
    implementation = getattr(args, "transformer_impl", None)
    if implementation is None:
        return
    missing = implementation == ENGINE and _version(ENGINE, ()) is None
    if missing and getattr(args, "spec", None) is None:
        raise UnsupportedError(
            f"--transformer-impl {ENGINE}, which is Megatron's default: Transformer Engine is not "
            f"installed. Install it, or use --transformer-impl local {' '.join(WITHOUT)}."
        )
    if getattr(args, "rank", None) == 0:
        print(line(implementation), flush=True)
