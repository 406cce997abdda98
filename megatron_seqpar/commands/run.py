# SPDX-License-Identifier: Apache-2.0
"""`megatron-seqpar run`: a pretraining script with the sequence-parallel axis."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

CONTEXT = {"allow_interspersed_args": False, "ignore_unknown_options": True}
"""Options end at SCRIPT: what follows is the script's, `--help` included."""


def run(
    script: Annotated[
        str | None,
        typer.Argument(
            help="The pretraining script, run unmodified. With --config it may be left out.",
            show_default=False,
        ),
    ] = None,
    args: Annotated[
        list[str] | None, typer.Argument(help="The script's own arguments, passed on as they are.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="A run, all in one file: a name in configs/runs, or such a file. ARGS go over it."
        ),
    ] = None,
    nproc: Annotated[
        int | None,
        typer.Option(
            "--nproc",
            "--nproc-per-node",
            help="Start this many processes here (one a GPU) with torchrun.",
        ),
    ] = None,
    nodes: Annotated[
        int | None, typer.Option(help="Machines of the run; this command is given on each.")
    ] = None,
    node_rank: Annotated[
        int | None, typer.Option(envvar="NODE_RANK", help="Which of them this is, from 0 on.")
    ] = None,
    master_addr: Annotated[
        str | None, typer.Option(envvar="MASTER_ADDR", help="Name or address of machine 0.")
    ] = None,
    master_port: Annotated[
        int, typer.Option(envvar="MASTER_PORT", help="A free port of machine 0.")
    ] = 29500,
    device: Annotated[
        str | None,
        typer.Option(help="auto (the default), cuda or cpu; auto takes GPUs where there are any."),
    ] = None,
    plugin: Annotated[
        bool, typer.Option("--plugin/--no-plugin", help="Add the axis, or run stock Megatron.")
    ] = True,
    torchrun_args: Annotated[
        str,
        typer.Option(help='More of torchrun\'s options, quoted: "--log-dir logs --tee 3".'),
    ] = "",
    model: Annotated[
        str | None,
        typer.Option(help="Flags of a model: a name in configs/models, or a file of such flags."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print the command and what its flags come to; start nothing."
        ),
    ] = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check/--no-check", help="With --dry-run: have Megatron parse the arguments, or not."
        ),
    ] = True,
) -> None:
    """Run SCRIPT with --sequence-parallel-size and the other flags of the plugin.

    Under torchrun it runs the script in this process; with --nproc it starts torchrun; with
    neither it runs one process. --dry-run prints the torchrun command, and as comments the
    arguments that differ from Megatron's defaults once its own and the plugin's checks passed.
    """
    from megatron_seqpar.errors import SeqParError
    from megatron_seqpar.launcher.environment import under_torchrun
    from megatron_seqpar.shipped import run_file

    from .run_plan import RunPlan, check_other_file, plan_of_file

    script_args = list(args or [])
    if config is not None and script is not None and script.startswith("-"):
        script_args = [script, *script_args]  # ARGS alone
        script = None
    if config is not None:
        config = run_file(config)
    started = under_torchrun()
    if nproc is not None and started:
        raise SeqParError("--nproc is given, but torchrun started this process; use only one")
    if config is not None and check_other_file(config, dry_run=dry_run, check=check):
        return
    if script is None and config is None:
        raise SeqParError("SCRIPT is missing: name a pretraining script, or a run with --config")
    if model is not None:  # before ARGS, where the same flag wins
        from megatron_seqpar.experiments.training import model_arguments
        from megatron_seqpar.shipped import model_file

        if config is not None:
            raise SeqParError(f"--model {model} with --config: write it in the file as 'model:'")
        script_args = [*model_arguments(model_file(model)), *script_args]
    if config is not None:
        plan = plan_of_file(config, nodes, nproc, dry_run=dry_run)
        script, script_args = script or plan.script, [*plan.arguments, *script_args]
    else:
        assert script is not None
        plan = RunPlan(script, [], nodes, nproc)
    device = device or plan.device
    for name, value in plan.environment.items():
        os.environ.setdefault(name, value)  # the shell's win
    meeting = []
    if not started:
        meeting = plan.meeting(node_rank, master_addr, master_port, placeholders=dry_run)
    options = [*meeting, *shlex.split(torchrun_args)]
    if dry_run:
        plan.show(script, script_args, device, options, plugin=plugin, check=check)
    else:
        _start(script, script_args, plan.nproc, device, options, plugin=plugin)


def _start(
    script: str,
    script_args: list[str],
    nproc: int | None,
    device: str,
    options: list[str],
    *,
    plugin: bool,
) -> None:
    """Run the script here, or start torchrun and leave with its status."""
    from megatron_seqpar import launcher
    from megatron_seqpar.launcher.argument_errors import asks_for_help
    from megatron_seqpar.launcher.environment import under_torchrun

    if under_torchrun() or asks_for_help(script_args) or (nproc is None and not options):
        launcher.run_script(script, script_args, device, plugin=plugin)
    else:
        status = launcher.launch(
            script, script_args, nproc or 1, device, plugin=plugin, torchrun_args=options
        )
        raise typer.Exit(status)
