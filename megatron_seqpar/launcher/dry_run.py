# SPDX-License-Identifier: Apache-2.0
"""Check command lines of a pretraining script without starting a rank.

The script itself runs, unmodified and patched as in a real run, in one process that is told it is
rank 0 of as many ranks as the run has. It is stopped once Megatron has parsed and validated its
arguments, before any process group, model or data (`dry_run_child`). All that Megatron and the
plugin refuse by then is refused here, with the same words.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_seqpar.errors import SeqParError

from .device import DEVICES
from .script import existing_script

_CHILD = "megatron_seqpar.launcher.dry_run_child"
_SECONDS = 300.0
_SET_BY_TORCHRUN = ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True)
class Order:
    """A command line to check: `ranks` processes in all, `per_node` on each node."""

    script: str
    arguments: tuple[str, ...]
    ranks: int
    per_node: int


@dataclass(frozen=True)
class Checked:
    """What came of it.

    Attributes:
        error: why the run would be refused; None where nothing refuses it.
        resolved: Megatron's arguments that are not at their defaults once validated, by name.
        said: lines that the plugin prints at the start, such as the schedule that `auto` took.
        notes: what this machine lacks of what the command line names: files, packages.
    """

    error: str | None = None
    resolved: Mapping[str, Any] = field(default_factory=dict)
    said: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def check(orders: Sequence[Order], device: str = "auto", *, plugin: bool = True) -> list[Checked]:
    """Check command lines, all in one process.

    `device` is 'auto', 'cuda' or 'cpu'. With 'cuda' this machine needs no GPU: Megatron's checks
    are made as on a Hopper GPU. Raises SeqParError for a script that does not exist, and when the
    checking itself fails.
    """
    if device not in DEVICES:
        raise SeqParError(f"--device {device}: choose one of {', '.join(DEVICES)}")
    for order in orders:
        existing_script(order.script)
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        asked = {
            "orders": [asdict(order) for order in orders],
            "device": device,
            "plugin": plugin,
            "answer": str(answer),
        }
        done = subprocess.run(
            [sys.executable, "-m", _CHILD],
            input=json.dumps(asked),
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            env=_environment(device),
            check=False,
        )
        if not answer.is_file():
            raise SeqParError(
                f"the check ended with status {done.returncode}:\n"
                + (done.stdout + done.stderr).strip()[-2000:]
            )
        return [
            Checked(one["error"], one["resolved"], tuple(one["said"]), tuple(one["notes"]))
            for one in json.loads(answer.read_text(encoding="utf-8"))
        ]


def _environment(device: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in _SET_BY_TORCHRUN}
    package_folder = str(Path(__file__).parents[2])
    kept["PYTHONPATH"] = os.pathsep.join(
        [*filter(None, kept.get("PYTHONPATH", "").split(os.pathsep)), package_folder]
    )
    if device == "cpu":
        kept["CUDA_VISIBLE_DEVICES"] = ""
    return kept
