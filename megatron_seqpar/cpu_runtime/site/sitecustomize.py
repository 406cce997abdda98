# SPDX-License-Identifier: Apache-2.0
"""Start-up file for child processes of the CPU runtime; put on PYTHONPATH by `child.arm()`.

It shadows a `sitecustomize` of the user's or the system's: that one is found and run as well.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys

_HERE = os.path.dirname(os.path.abspath(__file__))


def _run_shadowed() -> None:
    """Run the sitecustomize that Python would have found without this folder."""
    others = [path for path in sys.path if os.path.abspath(path or ".") != _HERE]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


class _AfterTorch(importlib.abc.MetaPathFinder):
    """Activates the runtime when torch has been imported; until then it costs nothing."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("torch")
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            if importlib.util.find_spec("megatron_seqpar") is None:
                sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(_HERE))))
            from megatron_seqpar.cpu_runtime import activate

            activate()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


_run_shadowed()
if os.environ.get("SEQPAR_CPU_RUNTIME") == "1":
    sys.meta_path.insert(0, _AfterTorch())
