# SPDX-License-Identifier: Apache-2.0
"""What each process of a run does: device, plugin, then the script, unmodified."""

from __future__ import annotations

import atexit
import importlib
import importlib.util
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_seqpar import cpu_runtime
from megatron_seqpar.compatibility import RELEASES
from megatron_seqpar.errors import SeqParError

from .argument_errors import asks_for_help, short_argument_errors, tolerant_help
from .dataset_helpers import use_built_helpers
from .device import resolve_device
from .environment import single_process, under_torchrun
from .failures import reported, reporting_failures
from .stop_signal import explain_stop


def run_script(
    script: str | os.PathLike[str],
    args: Sequence[str] = (),
    device: str = "auto",
    *,
    plugin: bool = True,
) -> None:
    """Run `script` as `python script *args` would, in this process.

    `device` is 'auto', 'cuda' or 'cpu'. With `plugin=False` Megatron is left as it is (apart from
    the CPU runtime where the device is the CPU). Without torchrun's variables in the environment
    this process is a world of one. Errors end the process with a short report (`failures`).
    """
    if not under_torchrun():
        single_process()
    explain_stop()
    atexit.register(_close_process_groups)
    with reporting_failures():
        path = existing_script(script)
        cpu_runtime.share_cores()
        if resolve_device(device) == "cpu":
            cpu_runtime.activate()
        elif plugin:
            # Megatron demands it below Blackwell where the axis (in CP's place) is larger than 1
            os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        enter_folder_of(path)
        sys.argv = [str(script), *args]
        short_argument_errors()
        if asks_for_help(args):
            tolerant_help()
        use_built_helpers()
        if plugin:
            install_plugin()
        runpy.run_path(str(path), run_name="__main__")


def existing_script(script: str | os.PathLike[str]) -> Path:
    """The absolute path of `script`; SeqParError where there is no such file."""
    path = Path(script).absolute()
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "does not exist"
        raise SeqParError(f"script {str(script)!r} {kind}; give the path of a Python file")
    return path


def install_plugin() -> None:
    """Patch Megatron with the sequence-parallel axis; SeqParError where Megatron is missing."""
    if importlib.util.find_spec("megatron") is None:
        raise SeqParError(
            f"Megatron is not installed: pip install megatron-core=={RELEASES[-1].version}, or run "
            "a script that lies in a Megatron-LM checkout"
        )
    importlib.import_module("megatron.core")
    importlib.import_module("megatron_seqpar.integration").install()


def _close_process_groups() -> None:
    """End what a run that succeeded leaves: gloo's threads can abort a process that exits on them.

    Registered before the script runs, so that its own exit handlers still have the groups.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and not reported.is_set() and distributed.is_initialized():
        distributed.destroy_process_group()


def enter_folder_of(script: Path) -> None:
    """Put the script's folder where Python puts it, without losing this package."""
    launcher_folder = Path(sys.argv[0]).absolute().parent
    if sys.path and Path(sys.path[0] or ".").absolute() in (Path.cwd(), launcher_folder):
        del sys.path[0]
    sys.path.insert(0, str(script.parent))
    package_folder = str(Path(__file__).parents[2])
    if package_folder not in sys.path:
        sys.path.append(package_folder)
