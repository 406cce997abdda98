# SPDX-License-Identifier: Apache-2.0
"""Telemetry of this rank's GPU while Megatron trains; without a GPU, why there is none."""

from __future__ import annotations

from typing import Any

import torch

from megatron_seqpar import cpu_runtime
from megatron_seqpar.config import as_typed
from megatron_seqpar.integration import state
from megatron_seqpar.telemetry.nvml import Gpu, NvmlAbsent
from megatron_seqpar.telemetry.sampler import Sampler

_sampler: Sampler | None = None
_record: dict[str, Any] = {"absent": "no training began"}


def begin() -> None:
    """Start sampling; who comes second while it runs changes nothing."""
    global _sampler, _record
    if _sampler is not None and _sampler.running:
        return
    _sampler = None
    config = state.config()
    if not config.telemetry_interval:
        _record = {"absent": as_typed(config, "telemetry_interval")}
    elif cpu_runtime.is_active():
        _record = {"absent": "the run is on the CPU"}
    else:
        try:
            uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
            _sampler = Sampler(Gpu(uuid), config.telemetry_interval)
            _sampler.start()
        except (NvmlAbsent, AttributeError, RuntimeError, AssertionError) as error:
            _record = {"absent": str(error)}


def end() -> dict[str, Any]:
    """Stop sampling; the summary of `Sampler`, or {"absent": why there is none}."""
    global _sampler, _record
    if _sampler is not None:
        _sampler.stop()
        _record, _sampler = _sampler.summary(), None
    return _record


def latest() -> dict[str, float]:
    """The last value of each quantity, while it samples."""
    return {} if _sampler is None else _sampler.latest()
