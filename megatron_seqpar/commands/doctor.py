# SPDX-License-Identifier: Apache-2.0
"""`megatron-seqpar doctor`: what this machine has, what is wrong with it, and what mends it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from megatron_seqpar.doctor import Finding

_STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red", "absent": "dim"}


def doctor(
    world: Annotated[
        int | None,
        typer.Option(min=1, help="Processes of the run you plan; default: as few as fit."),
    ] = None,
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel size.")] = 1,
    pp: Annotated[int, typer.Option(min=1, help="Pipeline-parallel size.")] = 1,
    sp: Annotated[int, typer.Option(min=1, help="Sequence-parallel size.")] = 1,
    nproc: Annotated[
        int, typer.Option(min=1, help="Processes of this machine; as many make the self-test.")
    ] = 2,
    device: Annotated[
        str, typer.Option(help="auto, cuda or cpu: with cuda it is a problem if NCCL cannot run.")
    ] = "auto",
    extra: Annotated[
        list[str] | None, typer.Option(help="An extra that must be there; may be given again.")
    ] = None,
    self_test: Annotated[
        bool, typer.Option("--self-test/--no-self-test", help="Compare numbers with fp64.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, nothing else.")] = False,
) -> None:
    """Look at versions, kernels, communication, GPUs, layout, limits, caches; test the numbers.

    Each problem comes with what mends it. The exit status is 0 where there is none, else 1.
    """
    from megatron_seqpar.doctor import Asked, Status, examine
    from megatron_seqpar.doctor.machine import Machine
    from megatron_seqpar.errors import SeqParError

    if device not in ("auto", "cuda", "cpu"):
        raise SeqParError(f"--device {device}: choose one of auto, cuda, cpu")
    asked = Asked(world, tp, pp, sp, nproc, device, tuple(extra or ()))
    leave_out = () if self_test else ("numerics",)
    findings = []
    console = None if as_json else _console()
    for finding in examine(asked, Machine(), leave_out):
        findings.append(finding)
        if console is not None:
            _show(console, finding)
    problems = [finding for finding in findings if finding.status is Status.PROBLEM]
    if console is None:
        found = [finding.as_dict() for finding in findings]
        typer.echo(json.dumps({"healthy": not problems, "findings": found}))
    else:
        count = len(problems)
        says = "healthy" if not count else f"{count} problem{'' if count == 1 else 's'}"
        console.print(f"\n{says}", style=_STYLES["problem" if count else "ok"])
    raise typer.Exit(1 if problems else 0)


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True)


def _show(console: Console, finding: Finding) -> None:
    """A line, its details, and the fix on a line of its own, to be copied."""
    from rich.markup import escape

    style = _STYLES[finding.status]
    console.print(
        f"[{style}]{finding.status:<8}[/] [bold]{finding.name:<14}[/] {escape(finding.text)}"
    )
    for line in finding.details:
        console.print(f"{'':<24}{escape(line)}", style="dim")
    if finding.fix is not None:
        console.print(f"{'':<9}[bold]fix[/]{'':<12}{escape(finding.fix)}")
