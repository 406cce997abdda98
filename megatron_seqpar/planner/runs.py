# SPDX-License-Identifier: Apache-2.0
"""Measured runs as CSV rows: what was run, and what came of it.

Columns, those with a star needed:

    layers* hidden* heads* ffn* seq_len* global_batch* world_size* tp* pp* micro_batch* status*
    model vocab kv_heads head_dim act_ckpt kernel seq_parallel step_time_s sp cp ep schedule
    recompute zero vpp mlp_chunks loss_chunks gradient_bytes dtype

`status` is ok, oom or anything else, which takes part in no comparison. `kernel` names the
attention kernel (torch, fused, flash_attention..., flash_attention2), with "+ RMS kernel" where
norms are fused. `act_ckpt` is none or every_layer, and `recompute`, where it is given, takes its
place. Rows with a column `loss_chunks` come from `megatron-seqpar sweep`: Megatron's layers, norms,
loss and fp32 gradients. Other rows are taken as those of the Layouts study (arXiv 2311.05610): a
vocabulary of 128,000, ZeRO 1 with bfloat16 gradients, and a loss over gathered fp32 logits. In both
MLPs are gated, the embedding is a matrix of its own, and gradients are reduced after backward; the
study's through copies.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import SeqParError
from ..mfu import Model, model_from_flags
from .layout import SCHEDULES, Layout, impossible

_VOCAB = 128_000
_OURS = ("flash3", "flash4", "cudnn", "aten", "cpu")
"""Kernels of this project that keep no scores."""
_CHECKPOINTING = {"none": "none", "disabled": "none", "": "none", "every_layer": "full"}


@dataclass(frozen=True)
class Run:
    """One row.

    Attributes:
        row: as it was read.
        sheet: the file that it was read from, without its ending.
        problem: why the layout cannot be predicted, or None.
    """

    row: Mapping[str, str]
    sheet: str
    model: Model
    layout: Layout
    problem: str | None = None

    @property
    def status(self) -> str:
        """ok, oom, or something else."""
        return self.row["status"].strip()

    @property
    def ok(self) -> bool:
        """Whether it ran and its time is known."""
        return self.status == "ok" and bool(self.row.get("step_time_s", "").strip())

    @property
    def decided(self) -> bool:
        """Whether it is known to fit or not."""
        return self.status in ("ok", "oom")

    @property
    def step_time(self) -> float:
        """Measured seconds of a step; of an `ok` run."""
        return float(self.row["step_time_s"])

    @property
    def group(self) -> tuple[str, ...]:
        """Runs that compete with each other: the same model, batch and ranks of one file."""
        names = ("model", "seq_len", "global_batch", "world_size")
        return (self.sheet, *(self.row.get(name, "") for name in names))


def read_runs(paths: Iterable[Path]) -> list[Run]:
    """All rows of CSV files. SeqParError names the file, the row and the column that is wrong."""
    runs = []
    for path in paths:
        try:
            with path.open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
        except (OSError, UnicodeDecodeError) as error:
            raise SeqParError(f"{path}: cannot be read: {error}") from None
        if not rows:
            raise SeqParError(f"{path}: holds no rows")
        for number, row in enumerate(rows, start=2):
            try:
                runs.append(run_of(row, path.stem))
            except SeqParError as error:
                raise SeqParError(f"{path}, line {number}: {error}") from None
    return runs


def run_of(row: Mapping[str, str], sheet: str = "") -> Run:
    """The run of one row. SeqParError names a column that is missing or wrong."""
    get = _Cells(row)
    model = _model(get)
    layout = _layout(get)
    problem = impossible(model, layout)
    if layout.ranks != get.number("world_size"):
        problem = f"tp x sp x pp = {layout.tp * layout.sp * layout.pp} does not divide world_size"
    get.text("status")
    return Run(row, sheet, model, layout, problem)


@dataclass(frozen=True)
class _Cells:
    row: Mapping[str, str]

    def text(self, name: str, default: str | None = None) -> str:
        value = (self.row.get(name) or "").strip()
        if not value:
            if default is None:
                raise SeqParError(f"column {name}: missing or empty")
            return default
        return value

    def number(self, name: str, default: int | None = None) -> int:
        text = self.text(name, None if default is None else str(default))
        try:
            return int(float(text))
        except ValueError:
            raise SeqParError(f"column {name}: {text!r} is no number") from None

    def pieces(self, name: str) -> int:
        """Of an MLP or a loss: 0 for off, and for auto, whose choice the row does not say."""
        text = self.text(name, "off")
        return int(text) if text.isdecimal() else 0


def _model(get: _Cells) -> Model:
    heads = get.number("heads")
    flags = {
        "num-layers": get.number("layers"),
        "hidden-size": get.number("hidden"),
        "num-attention-heads": heads,
        "num-query-groups": get.number("kv_heads", heads),
        "group-query-attention": True,
        "ffn-hidden-size": get.number("ffn"),
        "vocab-size": get.number("vocab", _VOCAB),
        "kv-channels": get.number("head_dim", get.number("hidden") // heads),
        "swiglu": True,
        "untie-embeddings-and-output-weights": True,
    }
    return model_from_flags(flags, "the row")


def _layout(get: _Cells) -> Layout:
    kernel = get.text("kernel", "flash_attention2 + RMS kernel")
    checkpointing = get.text("act_ckpt", "none")
    recompute = get.text("recompute", _CHECKPOINTING.get(checkpointing, "full"))
    tp, pp = get.number("tp"), get.number("pp")
    sp, cp = get.number("sp", 1), get.number("cp", 1)
    ours = "loss_chunks" in get.row
    element = 4 if get.text("dtype", "bfloat16") in ("float32", "fp32") else 2
    return Layout(
        sequence_length=get.number("seq_len"),
        global_batch=get.number("global_batch"),
        tp=tp,
        sp=sp * cp,
        pp=pp,
        dp=max(1, get.number("world_size") // (tp * pp * sp * cp)),
        ep=get.number("ep", 1),
        vpp=get.number("vpp", 1),
        micro_batch=get.number("micro_batch"),
        zero=get.number("zero", 1),
        recompute=recompute,
        mlp_chunks=get.pieces("mlp_chunks"),
        loss_chunks=get.pieces("loss_chunks"),
        tp_sp=get.text("seq_parallel", "False").lower() in ("true", "1", "yes"),
        schedule=_schedule(get.text("schedule", "balanced"), cp),
        kernel=_kernel(kernel),
        fused_norm=ours or "rms" in kernel.lower(),
        element=element,
        gradient_bytes=get.number("gradient_bytes", 4 if ours else 2),
        parallel_loss=ours,
        fused_loss=ours,
        plain_layers=not ours,
        overlap_dp=False,
        copied_reduction=not ours,
        uneven=True,
    )


def _schedule(name: str, cp: int) -> str:
    """The schedule to predict with: stock context parallelism is zigzag, and one of two levels is
    taken as its outer one."""
    if cp > 1:
        return "zigzag"
    outer = name.rpartition("+")[2]
    return outer if outer in SCHEDULES else "balanced"


def _kernel(name: str) -> str:
    """Of the names that occur in runs."""
    known = name.lower().replace(" ", "")
    if known.startswith(("flash_attention2", "flash2", "stock", "auto")) or known in _OURS:
        return "flash2"
    if known.startswith(("flash_attention", "flash1")):
        return "flash1"
    if known.startswith(("torch", "unfused", "reference")):
        return "torch"
    if known.startswith("fused"):
        return "fused"
    raise SeqParError(
        f"column kernel: {name!r}: use torch, fused, flash_attention or flash_attention2, "
        "each with '+ RMS kernel' where norms are fused"
    )


def check_device(runs: Iterable[Run], models: Sequence[str], cluster: str) -> None:
    """Raise SeqParError where a run says that it ran on a device that is not the cluster's.

    models: parts of the names that the cluster's devices have. Rows without a `device` column, as
    in the study's sheets, are taken at the caller's word.
    """
    for number, run in enumerate(runs, start=1):
        device = run.row.get("device", "").strip()
        if device and not any(part in device for part in models):
            known = " or ".join(models) or "no such device"
            raise SeqParError(
                f"{run.sheet}, row {number}: device {device}: --cluster {cluster} describes "
                f"{known}; name the cluster that it ran on (other hardware: describe it and "
                "calibrate, docs/planner.md)"
            )
