# SPDX-License-Identifier: Apache-2.0
"""Start several processes on this machine (or as one node of several) through torchrun."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Sequence

from megatron_seqpar import cpu_runtime
from megatron_seqpar.errors import SeqParError

from .device import resolve_device
from .failures import say
from .script import existing_script


def torchrun_arguments(
    script: str | os.PathLike[str],
    args: Sequence[str],
    nproc: int,
    device: str = "auto",
    *,
    plugin: bool = True,
    torchrun_args: Sequence[str] = (),
) -> list[str]:
    """What follows `torchrun` on the command line.

    `torchrun_args` are torchrun's own options, such as --nnodes and --rdzv-endpoint; without any of
    those that name a meeting point the run is --standalone.
    """
    meeting = ("--nnodes", "--rdzv", "--master", "--standalone")
    alone = not any(arg.startswith(meeting) for arg in torchrun_args)
    return [
        *(["--standalone"] if alone else []),
        *torchrun_args,
        f"--nproc-per-node={nproc}",
        "-m",
        "megatron_seqpar",
        "run",
        f"--device={device}",
        *([] if plugin else ["--no-plugin"]),
        str(script),
        *args,
    ]


def torchrun_command(arguments: Sequence[str]) -> str:
    """The shell command that does what `launch` does, with this interpreter."""
    return shlex.join([sys.executable, "-m", "torch.distributed.run", *arguments])


def launch(
    script: str | os.PathLike[str],
    args: Sequence[str] = (),
    nproc: int = 1,
    device: str = "auto",
    *,
    plugin: bool = True,
    torchrun_args: Sequence[str] = (),
) -> int:
    """Run `script` in `nproc` processes and wait; the exit status, 0 if all succeeded.

    Raises SeqParError where the script does not exist, `nproc` is below 1 or above the number of
    GPUs, or `device` cannot be had.
    """
    if nproc < 1:
        raise SeqParError(f"--nproc {nproc}: start at least one process")
    existing_script(script)
    os.environ["LOCAL_WORLD_SIZE"] = str(nproc)
    try:
        cpu_runtime.share_cores()
        resolve_device(device)
    finally:
        del os.environ["LOCAL_WORLD_SIZE"]
    arguments = torchrun_arguments(
        script, args, nproc, device, plugin=plugin, torchrun_args=torchrun_args
    )
    return _run_agent(arguments)


def _run_agent(arguments: Sequence[str]) -> int:
    """torchrun in this process, with one line in place of its report of failed processes."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        run.main(list(arguments))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        say(f"megatron-seqpar: rank {rank} {describe_exit(failure.exitcode)}; all ranks stopped")
        return failure.exitcode if 0 < failure.exitcode < 256 else 128 - failure.exitcode
    except SignalException as error:
        say(f"megatron-seqpar: stopped by {error.sigval.name}; all ranks stopped")
        return 128 + int(error.sigval)
    return 0


def describe_exit(code: int) -> str:
    """'failed with exit code 1' or 'was killed by SIGKILL ...' for a process's exit status."""
    import signal

    if code >= 0:
        return f"failed with exit code {code}"
    name = signal.Signals(-code).name
    memory = " (the system kills a process that takes too much memory)" if name == "SIGKILL" else ""
    return f"was killed by {name}{memory}"
