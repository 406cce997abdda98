# SPDX-License-Identifier: Apache-2.0
"""Megatron's C++ index builder, where Megatron cannot compile it but an installed copy fits.

`megatron.training` always runs `make` in `megatron/core/datasets`. The megatron-core wheel brings
the built module and no Makefile, so `make` fails; a checkout brings the Makefile, but building it
needs pybind11 and a writable folder. Where a built module exists on the path of the `megatron`
namespace it is used and nothing is compiled. This has nothing to do with the device.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from megatron_seqpar.cpu_runtime.import_hooks import after_import

NAME = "megatron.core.datasets.helpers_cpp"


def built_helpers() -> Path | None:
    """A built `helpers_cpp` in any `megatron` folder on sys.path, the first one found."""
    for folder in sys.path:
        datasets = Path(folder or ".") / "megatron" / "core" / "datasets"
        for suffix in importlib.machinery.EXTENSION_SUFFIXES:
            file = datasets / f"helpers_cpp{suffix}"
            if file.is_file():
                return file.resolve()
    return None


def use_built_helpers() -> None:
    """Before Megatron is imported: skip `make` and load the built module where there is one."""
    file = built_helpers()
    if file is None:
        return

    def skip_make(module: ModuleType) -> None:
        module.compile_helpers = lambda: None  # type: ignore[attr-defined]

    after_import("megatron.core.datasets.utils", skip_make)
    sys.meta_path.insert(0, _HelpersFinder(file))


class _HelpersFinder:
    """Finds `megatron.core.datasets.helpers_cpp`, and only that, in a file outside its package."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def find_spec(
        self, fullname: str, path: object = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != NAME:
            return None
        return importlib.util.spec_from_file_location(fullname, self.file)
