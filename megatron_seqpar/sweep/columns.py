# SPDX-License-Identifier: Apache-2.0
"""The CSV of a sweep: tidy, one row a run, its columns a superset of what the planner reads.

The first columns are those of the study of parallel layouts (arXiv 2311.05610) that the planner
calibrates from, the next those that its models lack (SP, schedule, recompute, ZeRO, pieces), then
what else was measured, and what it was measured with.

    seq_len, global_batch, micro_batch   in tokens, sequences, sequences
    act_ckpt                             every_layer where stock full recomputation is on, else none
    seq_parallel                         TP-SP
    status                               ok, oom or error; `flags` says refused or timeout
    step_time_s                          median of the steps after the first
    mfu, causal_mfu                      megatron_seqpar.mfu; empty where no peak is known
    memory                               in bytes, of the fullest rank
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_seqpar.experiments.layout import STOCK
from megatron_seqpar.experiments.store import write_whole
from megatron_seqpar.mfu import Model, Peak, model_flops, utilization
from megatron_seqpar.sweep.space import Point

COLUMNS = (
    *("sweep", "trial_id", "model", "hidden", "layers", "heads", "ffn", "seq_len", "global_batch"),
    *("world_size", "tp", "pp", "dp", "micro_batch", "num_microbatches", "act_ckpt", "kernel"),
    *("attention_kernel", "seq_parallel", "status", "step_time_s", "mfu"),
    *("sp", "cp", "ep", "vpp", "schedule", "recompute", "zero", "mlp_chunks", "loss_chunks"),
    *("kv_heads", "head_dim", "vocab", "dtype", "causal_mfu", "peak_tflops", "peak_basis"),
    *("tokens_per_s", "step_time_spread", "peak_memory_bytes", "memory_since_start_bytes"),
    *("bytes_sent_per_step", "last_loss", "flags", "reason"),
    *("layout", "device", "backend", "backend_version", "topology", "versions", "command"),
)


def csv_row(
    row: Mapping[str, Any],
    point: Point,
    model: Model,
    name: str,
    global_batch: int,
    peak: Peak | None,
) -> dict[str, Any]:
    """The cells of a stored row; what it does not have is empty."""
    layout, ok = point.layout, row["status"] == "ok"
    device = row.get("device", {})
    seconds = row.get("step_time_s")

    def share(causal: bool) -> float | None:
        if not ok or peak is None or not seconds:
            return None
        flops = model_flops(model, point.sequence_length, global_batch, causal=causal)
        return utilization(flops, seconds, layout.ranks, peak.value)

    kernel = "unfused" if layout.kernel == STOCK and device.get("kind") != "cuda" else layout.kernel
    return {
        "sweep": name,
        "trial_id": row.get("key", "")[:10],
        "model": row["model"],
        "hidden": model.hidden,
        "layers": model.layers,
        "heads": model.query_heads,
        "ffn": model.ffn,
        "seq_len": point.sequence_length,
        "global_batch": global_batch,
        "world_size": layout.ranks,
        "tp": layout.tp,
        "pp": layout.pp,
        "dp": layout.dp or None,
        "micro_batch": layout.micro_batch,
        "num_microbatches": global_batch // (layout.dp * layout.micro_batch) if layout.dp else None,
        "act_ckpt": "every_layer" if layout.recompute == "full" else "none",
        "kernel": kernel,
        "attention_kernel": kernel,
        "seq_parallel": layout.tp_sp,
        "status": row["status"],
        "step_time_s": seconds,
        "mfu": share(False),
        "sp": layout.sp,
        "cp": layout.cp,
        "ep": layout.ep,
        "vpp": layout.vpp,
        "schedule": layout.schedule if layout.sp > 1 else None,
        "recompute": layout.recompute,
        "zero": layout.zero,
        "mlp_chunks": layout.mlp_chunks,
        "loss_chunks": layout.loss_chunks,
        "kv_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "vocab": model.vocab,
        "dtype": row.get("dtype"),
        "causal_mfu": share(True),
        "peak_tflops": None if peak is None else peak.value / 1e12,
        "peak_basis": None if peak is None else peak.basis,
        "tokens_per_s": row.get("tokens_per_s"),
        "step_time_spread": row.get("step_time_spread"),
        "peak_memory_bytes": row.get("peak_memory_bytes"),
        "memory_since_start_bytes": row.get("memory_since_start_bytes"),
        "bytes_sent_per_step": row.get("bytes_sent_per_step"),
        "last_loss": row["losses"][-1] if row.get("losses") else None,
        "flags": _flags(row),
        "reason": " ".join(row["reason"].split())[:300],
        "layout": layout.label(),
        "device": device.get("name"),
        "backend": device.get("backend"),
        "backend_version": device.get("backend_version"),
        "topology": row.get("topology"),
        "versions": json.dumps(row["versions"], sort_keys=True) if ok else None,
        "command": row.get("command"),
    }


def _flags(row: Mapping[str, Any]) -> str:
    if row["reason"].startswith("timeout"):
        return "timeout"
    return "refused" if row.get("refused") else ""


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write all rows: wholly, or the file stays as it was."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _cell(row[name]) for name in COLUMNS})
    write_whole(path, text.getvalue())


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else value
