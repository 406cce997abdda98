# SPDX-License-Identifier: Apache-2.0
"""When the runtime switches on, when it refuses, and that it reaches child processes."""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cpu_runtime.fresh_process import FreshProcessError, run_fresh

ASKS_FOR_CUDA = "import torch; print(torch.cuda.is_available())"


def forget_megatron() -> None:
    """Undo the preloading of the test's fork server."""
    for name in [name for name in sys.modules if name.split(".")[0] == "megatron"]:
        del sys.modules[name]


def test_importing_changes_nothing_and_imports_neither_torch_nor_megatron() -> None:
    code = (
        "import sys, megatron_seqpar.cpu_runtime, megatron_seqpar.launcher, megatron_seqpar.cli\n"
        "print([m for m in ('torch', 'megatron', 'megatron.core') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def activate_twice() -> tuple[bool, bool, dict[str, str | None]]:
    forget_megatron()
    for name in ("TORCHDYNAMO_DISABLE", "CUDA_DEVICE_MAX_CONNECTIONS", "OMP_NUM_THREADS"):
        os.environ.pop(name, None)
    import torch

    from megatron_seqpar import cpu_runtime

    before = cpu_runtime.is_active()
    cpu_runtime.activate()
    patched = torch.zeros
    cpu_runtime.activate()
    assert torch.zeros is patched
    assert "megatron.core" not in sys.modules
    names = ("TORCHDYNAMO_DISABLE", "CUDA_DEVICE_MAX_CONNECTIONS", "OMP_NUM_THREADS")
    return before, cpu_runtime.is_active(), {name: os.environ.get(name) for name in names}


def test_activates_once_and_sets_the_environment() -> None:
    before, after, environment = run_fresh(activate_twice, LOCAL_WORLD_SIZE="1000")
    assert (before, after) == (False, True)
    assert environment == {
        "TORCHDYNAMO_DISABLE": "1",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "OMP_NUM_THREADS": "1",
    }


def activate_beside_a_gpu() -> None:
    forget_megatron()
    import torch

    from megatron_seqpar import cpu_runtime

    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 8
    cpu_runtime.activate()


def test_refuses_where_torch_sees_a_gpu() -> None:
    with pytest.raises(FreshProcessError, match=r"SeqParError: .*torch sees 8.*--device cuda"):
        run_fresh(activate_beside_a_gpu)


def activate_late() -> None:
    from megatron_seqpar import cpu_runtime

    cpu_runtime.activate()


def test_refuses_after_megatron_was_imported() -> None:
    with pytest.raises(FreshProcessError, match=r"megatron\.core was imported before"):
        run_fresh(activate_late)


def versions_that_warn(torch_version: str) -> list[str]:
    forget_megatron()
    import warnings

    import torch

    from megatron_seqpar import cpu_runtime

    torch.__version__ = torch_version
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cpu_runtime.activate()
    return [str(each.message) for each in caught if "CPU runtime" in str(each.message)]


def test_warns_on_a_version_that_was_not_checked() -> None:
    assert run_fresh(versions_that_warn, "2.11.3+cpu") == []
    (warning,) = run_fresh(versions_that_warn, "2.110.0")
    assert "torch 2.11; this is 2.110.0" in warning


def asks_here() -> bool:
    import torch

    return torch.cuda.is_available()


def _put_answer(queue: Any) -> None:
    queue.put(asks_here())


def start_children(leave_out: tuple[str, ...], folder: str) -> tuple[str, bool]:
    """What a plain child and a spawned one are told about CUDA."""
    forget_megatron()
    from megatron_seqpar import cpu_runtime

    # a sitecustomize of the user's own, which ours shadows
    Path(folder, "sitecustomize.py").write_text("print('mine too')\n")
    os.environ["PYTHONPATH"] = folder
    cpu_runtime.activate(leave_out=leave_out)
    command = [sys.executable, "-c", ASKS_FOR_CUDA]
    plain = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=_put_answer, args=(queue,))
    child.start()
    spawned = queue.get(timeout=60)
    child.join(10)
    return plain, spawned


def test_reaches_child_processes(tmp_path: Path) -> None:
    assert run_fresh(start_children, (), str(tmp_path)) == ("mine too\nTrue\n", True)


def test_child_processes_would_be_missed_without_the_hook(tmp_path: Path) -> None:
    missed = run_fresh(start_children, ("child_processes",), str(tmp_path))
    assert missed == ("mine too\nFalse\n", False)
