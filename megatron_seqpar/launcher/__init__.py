# SPDX-License-Identifier: Apache-2.0
"""Starts an unmodified pretraining script with the plugin (and, without a GPU, the CPU runtime).

    torchrun.py         launch(): starts torchrun for several processes, reports who failed
    script.py           run_script(): what each process does
    device.py           cuda or cpu
    environment.py      variables of a process that no torchrun started
    failures.py         one short block for an error instead of a traceback
    argument_errors.py  a wrong flag in one line; a --help that works
    stop_signal.py      says why a process was stopped, even while it waits in a collective
    dataset_helpers.py  Megatron's index builder where it cannot be compiled

Importing it imports neither torch nor Megatron.
"""

from .script import run_script
from .torchrun import launch, torchrun_command

__all__ = ["launch", "run_script", "torchrun_command"]
