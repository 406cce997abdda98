# SPDX-License-Identifier: Apache-2.0
"""The planner's free constants: what each means, and what to believe before anything was measured.

Every constant is a positive number with a prior: a value that follows from how the hardware or the
software works, and a spread in log space that says how sure that is (0.1 is about 10%).
Calibration moves a constant only as far as measured rows outweigh its prior, so three rows already
help and none is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum


class Basis(StrEnum):
    """Where a number comes from."""

    MEASURED = "measured"  # on such a machine, by this project
    CALIBRATED = "calibrated"  # fitted to measured runs
    PUBLISHED = "published"  # by the vendor or by others
    ASSUMED = "assumed"  # a prior, or carried over from other hardware


def _constant(prior: float, spread: float, unit: str, meaning: str, kind: str = "time") -> float:
    """A field with its prior; `kind` says which fit it belongs to, time or memory."""
    value: float = field(
        default=prior, metadata={"spread": spread, "unit": unit, "meaning": meaning, "kind": kind}
    )
    return value


@dataclass(frozen=True)
class Constants:
    """Free constants of the time and the memory model. Units stand in `unit_of`."""

    gemm_share: float = _constant(
        0.80, 0.08, "of peak", "speed of matrix products that are large in every dimension"
    )
    gemm_half: float = _constant(
        160.0, 0.4, "elements", "a product loses half its speed where 1/m + 1/n + 1/k = 1/this"
    )
    flash2_speed: float = _constant(
        1.0, 0.05, "of the cluster's kernel", "FlashAttention-2 against the cluster's curves"
    )
    flash1_speed: float = _constant(
        0.55, 0.3, "of the cluster's kernel", "FlashAttention 1 against the cluster's curves"
    )
    fused_traffic: float = _constant(
        26.0, 0.4, "bytes/score", "memory traffic of a fused scale-mask-softmax kernel, both passes"
    )
    torch_traffic: float = _constant(
        60.0, 0.4, "bytes/score", "memory traffic of softmax attention in plain torch, both passes"
    )
    wide_traffic: float = _constant(
        80.0,
        0.4,
        "bytes/(token hidden)",
        "norms and residuals of a layer, fused norms, both passes",
    )
    norm_traffic: float = _constant(
        200.0, 0.5, "bytes/(token hidden)", "what norms in plain torch move on top"
    )
    narrow_traffic: float = _constant(
        1.0, 0.2, "of the count", "rotary embedding and gated activation against a plain count"
    )
    loss_traffic: float = _constant(
        40.0, 0.4, "bytes/logit", "cross entropy over fp32 logits, both passes"
    )
    layer_overhead: float = _constant(
        4e-4, 0.7, "s", "launches and gaps of one layer and micro-batch, both passes"
    )
    tp_bandwidth: float = _constant(
        0.60, 0.3, "of the link", "bus bandwidth of tensor-parallel collectives"
    )
    tp_latency: float = _constant(2e-5, 0.7, "s", "start of a tensor-parallel collective")
    pp_overhead: float = _constant(
        0.03, 0.6, "of a stage", "waits at a pipeline's sends and receives, each micro-batch"
    )
    dp_bandwidth: float = _constant(
        0.40, 1.0, "of the link", "bus bandwidth of the data-parallel reduction over few ranks"
    )
    dp_contention: float = _constant(
        0.02, 1.0, "1/rank", "how much of it each further rank of a data-parallel group takes"
    )
    dp_squeeze: float = _constant(
        0.5,
        1.0,
        "share",
        "of a data-parallel reduction, on top of it where its copies find no free memory",
    )
    dp_exposed: float = _constant(
        0.5, 0.4, "share", "of an overlapped data-parallel reduction that is waited for"
    )
    step_overhead: float = _constant(0.1, 0.7, "s", "of a step, whatever its size")
    context_bytes: float = _constant(
        1.5e9, 0.5, "bytes", "CUDA context, communicators and workspaces of a rank", "memory"
    )
    activation_slack: float = _constant(
        1.03, 0.02, "of activations", "what the caching allocator rounds up and fragments", "memory"
    )
    norm_kept: float = _constant(
        14.0, 0.2, "bytes/(token hidden)", "what two norms in plain torch keep on top", "memory"
    )
    logit_bytes: float = _constant(
        20.0, 0.15, "bytes/logit", "logits, softmax and gradients of an unfused loss", "memory"
    )
    gather_bytes: float = _constant(
        6.0, 0.5, "bytes/logit", "copies on top where logits are gathered over TP ranks", "memory"
    )
    copies_kept: float = _constant(
        2.0,
        0.5,
        "elements/(token hidden)",
        "kept around TP's all-reduces by plain layers",
        "memory",
    )
    flight_slack: float = _constant(
        0.1,
        1.0,
        "micro-batches",
        "held longer than 1F1B needs, on all but the last stage",
        "memory",
    )
    fused_kept: float = _constant(
        4.0, 0.3, "bytes/score", "what a fused softmax attention keeps", "memory"
    )
    torch_kept: float = _constant(
        8.0, 0.3, "bytes/score", "what softmax attention in plain torch keeps", "memory"
    )
    torch_moment: float = _constant(
        8.0, 0.4, "bytes/score", "what comes and goes on top in one layer's backward", "memory"
    )

    @classmethod
    def names(cls, kind: str | None = None) -> tuple[str, ...]:
        """Names of all constants, or of those of one kind."""
        return tuple(f.name for f in fields(cls) if kind in (None, f.metadata["kind"]))

    def changed(self, values: Mapping[str, float]) -> Constants:
        """A copy with other values."""
        return replace(self, **values)


def prior_of(name: str) -> tuple[float, float]:
    """Prior value and its spread in log space."""
    found = _FIELDS[name]
    value = found.default
    assert isinstance(value, float)
    return value, float(found.metadata["spread"])


def unit_of(name: str) -> str:
    """The unit of a constant."""
    return str(_FIELDS[name].metadata["unit"])


def meaning_of(name: str) -> str:
    """What a constant is."""
    return str(_FIELDS[name].metadata["meaning"])


_FIELDS = {f.name: f for f in fields(Constants)}
