# SPDX-License-Identifier: Apache-2.0
"""`megatron-seqpar run`: a pretraining script with the sequence-parallel axis."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

CONTEXT = {"allow_interspersed_args": False, "ignore_unknown_options": True}
"""Options end at SCRIPT: what follows is the script's, `--help` included."""


def run(
    script: Annotated[str, typer.Argument(help="The pretraining script, run unmodified.")],
    args: Annotated[
        list[str] | None, typer.Argument(help="The script's own arguments, passed on as they are.")
    ] = None,
    nproc: Annotated[
        int | None,
        typer.Option("--nproc", help="Start this many processes here (one a GPU) with torchrun."),
    ] = None,
    device: Annotated[
        str, typer.Option(help="auto, cuda or cpu; auto takes GPUs where there are any.")
    ] = "auto",
    plugin: Annotated[
        bool, typer.Option("--plugin/--no-plugin", help="Add the axis, or run stock Megatron.")
    ] = True,
    torchrun_args: Annotated[
        str,
        typer.Option(help='torchrun\'s options, quoted: "--nnodes 2 --rdzv-endpoint host:29500".'),
    ] = "",
    model: Annotated[
        str | None,
        typer.Option(help="Flags of a model: a name in configs/models, or a file of such flags."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the torchrun command and stop.")
    ] = False,
) -> None:
    """Run SCRIPT with --sequence-parallel-size and the other flags of the plugin.

    Under torchrun it runs the script in this process; with --nproc it starts torchrun; with
    neither it runs one process.
    """
    from megatron_seqpar import launcher
    from megatron_seqpar.errors import SeqParError
    from megatron_seqpar.launcher.argument_errors import asks_for_help
    from megatron_seqpar.launcher.environment import under_torchrun
    from megatron_seqpar.launcher.torchrun import torchrun_arguments

    script_args = args or []
    if model is not None:  # before ARGS, where the same flag wins
        from megatron_seqpar.experiments.training import model_arguments
        from megatron_seqpar.shipped import model_file

        script_args = [*model_arguments(model_file(model)), *script_args]
    options = shlex.split(torchrun_args)
    if nproc is not None and under_torchrun():
        raise SeqParError("--nproc is given, but torchrun started this process; use only one")
    if dry_run:
        arguments = torchrun_arguments(
            script, script_args, nproc or 1, device, plugin=plugin, torchrun_args=options
        )
        typer.echo(launcher.torchrun_command(arguments))
    elif asks_for_help(script_args) or (nproc is None and not options):
        launcher.run_script(script, script_args, device, plugin=plugin)
    else:
        status = launcher.launch(
            script, script_args, nproc or 1, device, plugin=plugin, torchrun_args=options
        )
        raise typer.Exit(status)
