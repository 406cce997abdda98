# SPDX-License-Identifier: Apache-2.0
"""Model FLOPs utilization of the run that this process takes part in.

The formula is that of `megatron_seqpar.mfu`; here are its inputs: the model from Megatron's
arguments, or why they do not describe one that it counts, and the peak of this rank's device. A
number that would be wrong is left out, and `notes` says why.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from megatron.training import get_args

from megatron_seqpar import cpu_runtime
from megatron_seqpar.attention import masks
from megatron_seqpar.errors import SeqParError
from megatron_seqpar.integration import meeting, run_facts, state
from megatron_seqpar.mfu import Model, Peak, Window, model_flops, model_from_flags, peak_of
from megatron_seqpar.mfu import utilization as share

MEASURED_SECONDS = 0.3
MEASURED_SIZE = 1024
SLOW_SECONDS = 0.01
MEETING_PATIENCE = 10.0


@dataclasses.dataclass(frozen=True)
class Utilization:
    """What MFU is reckoned from.

    Attributes:
        flops_per_token: as `mfu.model_flops` counts them, or None.
        causal_flops_per_token: the same of the keys that a causal mask leaves, or None.
        peak: of this rank's device, or None.
        notes: why something is None, or not what one might take it for.
    """

    flops_per_token: float | None = None
    causal_flops_per_token: float | None = None
    peak: Peak | None = None
    notes: tuple[str, ...] = ()

    def of(self, tokens_per_second: float, ranks: int) -> tuple[float | None, float | None]:
        """(MFU, causal MFU), 0 to 1, of `ranks` devices like this one; None where unknown."""
        if self.peak is None:
            return None, None
        peak = self.peak.value
        mfu, causal = (
            None if flops is None else share(flops * tokens_per_second, 1.0, ranks, peak)
            for flops in (self.flops_per_token, self.causal_flops_per_token)
        )
        return mfu, causal

    def as_record(self) -> dict[str, Any]:
        """What a rank tells of itself: plain values."""
        peak = None if self.peak is None else dataclasses.asdict(self.peak)
        return {"peak": peak, "notes": list(self.notes)}

    def summary(
        self, rates: run_facts.Rates, ranks: Sequence[Mapping[str, Any]], world: int
    ) -> dict[str, Any]:
        """The numbers of a report's summary, of all `world` ranks.

        ranks: what each one's `as_record()` told; the peak is their mean.
        """
        peaks = [rank["peak"] for rank in ranks]
        peak = None
        if all(known is not None for known in peaks):
            value = statistics.fmean(known["value"] for known in peaks)
            peak = Peak(value, peaks[0]["basis"], peaks[0]["source"])
        whole = dataclasses.replace(self, peak=peak)
        mfu, causal = None, None
        if rates.tokens_per_second is not None:
            mfu, causal = whole.of(rates.tokens_per_second, world)
        notes = dict.fromkeys(note for rank in ranks for note in rank["notes"])
        return {
            "model_flops_per_step": _times(self.flops_per_token, rates.tokens),
            "causal_model_flops_per_step": _times(self.causal_flops_per_token, rates.tokens),
            "peak_flops_per_rank": None if peak is None else peak.value,
            "peak_basis": None if peak is None else peak.basis,
            "peak_source": None if peak is None else peak.source,
            "mfu": mfu,
            "causal_mfu": causal,
            "mfu_note": "; ".join(notes) or None,
        }


def _times(flops: float | None, tokens: float | None) -> float | None:
    return None if flops is None or tokens is None else flops * tokens


_current: tuple[Any, Utilization] | None = None


def begin(train_args: Sequence[Any], train_kwargs: Mapping[str, Any]) -> Utilization:
    """The utilization of the run that begins, from what Megatron's `train` was called with.

    Every rank calls it before the first step: without a GPU the peak is measured, on all ranks at
    once. Who comes second in a run gets the same.
    """
    global _current
    model = train_kwargs.get("model", train_args[1] if len(train_args) > 1 else None)
    if _current is None or _current[0] is not model:
        try:
            found = _of_run(model)
        except Exception as error:  # told where the number would stand; the run goes on
            found = Utilization(notes=(f"{type(error).__name__}: {error}",))
        _current = model, found
    return _current[1]


def current() -> Utilization:
    """That of the run; without numbers before one began."""
    return Utilization() if _current is None else _current[1]


def _of_run(model: Any) -> Utilization:
    flops, causal, notes = None, None, []
    why = _why_uncounted(model, vars(get_args()))
    if why is None:
        counted, why = _model(vars(get_args()))
        if counted is not None:
            length = int(get_args().seq_length)
            flops = model_flops(counted, length) / length
            causal = model_flops(counted, length, causal=True) / length
    if why is not None:
        notes.append(why)
    if causal is not None:
        why = _why_not_causal(vars(get_args()))
        if why is not None:
            notes.append(f"causal MFU: {why}")
            causal = None
    peak, why = _peak()
    if why is None:
        why = _why_peak_is_low(vars(get_args()))
    if why is not None:
        notes.append(why)
    return Utilization(flops, causal, peak, tuple(notes))


_UNCOUNTED: dict[str, str] = {
    "hybrid_layer_pattern": "layers of hybrid models are not counted",
    "hybrid_override_pattern": "layers of hybrid models are not counted",
    "heterogeneous_layers_config_path": "layers that differ from one another are not counted",
    "experimental_attention_variant": "this attention is not counted",
    "linear_attention_freq": "linear attention is not counted",
    "moe_latent_size": "experts of a latent size are not counted",
    "freeze_all_layers": "what is not trained is not counted",
    "variable_seq_lengths": "how many tokens a step holds is not known",
    "perform_rl_step": "how many tokens a step holds is not known",
    "sft": "how many tokens a step holds is not known",
}
"""Arguments of Megatron's under which the formula's number would be wrong, and why."""


def _why_uncounted(model: Any, flags: Mapping[str, Any]) -> str | None:
    """Why the formula does not count what is trained, or None."""
    for name, why in _UNCOUNTED.items():
        value = flags.get(name)
        if value:
            shown = "" if value is True else f" {value}"
            return f"--{name.replace('_', '-')}{shown}: {why}"
    from megatron.core.models.gpt import GPTModel

    chunks = list(model) if isinstance(model, (list, tuple)) else [model]
    for chunk in chunks:
        while hasattr(chunk, "module"):  # Float16Module, DistributedDataParallel
            chunk = chunk.module
        if not isinstance(chunk, GPTModel):
            return f"{type(chunk).__name__}: only a GPTModel is counted"
    return None


def _model(flags: Mapping[str, Any]) -> tuple[Model | None, str | None]:
    """(the model, None) or (None, why it cannot be read from Megatron's arguments)."""
    given = dict(flags)
    if not given.get("group_query_attention"):
        given.pop("num_query_groups", None)  # whose default is a number in some versions
    try:
        model = model_from_flags(given, "Megatron's arguments")
    except (SeqParError, ValueError, TypeError) as error:
        return None, str(error)
    mask = masks.as_mask(state.config().mask)
    if isinstance(mask, masks.SlidingWindow):
        if mask.right != 0 or mask.sink_tokens:
            return None, f"--seqpar-mask {state.config().mask}: only windows LEFT[,0] are counted"
        if mask.left >= 0:
            model = dataclasses.replace(model, window=Window(mask.left + 1))
    return model, None


def _why_not_causal(flags: Mapping[str, Any]) -> str | None:
    """Why the keys that the mask leaves are not those of a causal mask, or None."""
    for name in ("reset_attention_mask", "dataloader_inter_document_masking"):
        if flags.get(name):
            return f"--{name.replace('_', '-')}: keys of other documents are not counted out"
    if not isinstance(masks.as_mask(state.config().mask), (masks.Causal, masks.SlidingWindow)):
        return f"--seqpar-mask {state.config().mask}: only causal masks and windows are counted"
    return None


def _peak() -> tuple[Peak | None, str | None]:
    """(this rank's peak, None) or (None, why it is not known)."""
    given = state.config().peak_tflops
    if given is not None:
        return Peak(given * 1e12, "given", f"--seqpar-peak-tflops {given:g}"), None
    dtype, name = run_facts.dtype_name(), run_facts.device_name()
    if cpu_runtime.is_active():
        met = meeting.together("measure the peak", MEETING_PATIENCE)
        return measured_peak(getattr(torch, dtype), "all ranks at once" if met else "alone"), None
    if dtype == "float32" and torch.get_float32_matmul_precision() != "highest":
        return None, "peak: float32 products may use TF32 here; give --seqpar-peak-tflops"
    peak = peak_of(name, dtype)
    if peak is None:
        return None, f"peak: none is known of {name} in {dtype}; give --seqpar-peak-tflops"
    return peak, None


def _why_peak_is_low(flags: Mapping[str, Any]) -> str | None:
    """What computes faster than the peak of the weights' dtype allows, unless a peak is given."""
    narrow = next((name for name in ("fp8", "fp4") if flags.get(name)), None)
    if narrow is None or state.config().peak_tflops is not None:
        return None
    return f"--{narrow}-format {flags[narrow]}: the peak is that of {run_facts.dtype_name()}"


def measured_peak(dtype: torch.dtype, how: str) -> Peak:
    """FLOP/s of a large matrix product on this process's threads, the median of 0.3 s of them.

    Large: 1,024 wide, or 512 where that would take seconds.

    how: says in the source who else measured meanwhile.
    """
    threads, name = torch.get_num_threads(), str(dtype).removeprefix("torch.")
    size = MEASURED_SIZE
    if _product_seconds(size // 4, dtype, 0.0) > SLOW_SECONDS:
        size //= 2  # bfloat16 on a CPU that has no instructions for it
    seconds = _product_seconds(size, dtype, MEASURED_SECONDS)
    source = f"product of {size} x {size} matrices in {name}, threads {threads}, {how}"
    return Peak(2 * size**3 / seconds, "measured", source)


def _product_seconds(size: int, dtype: torch.dtype, lasting: float) -> float:
    """Median seconds of a product of two square matrices on the CPU."""
    # no random numbers: the run's own must not depend on whether this was measured
    factor = torch.linspace(-1, 1, size * size, device="cpu").reshape(size, size).to(dtype)
    product = torch.empty_like(factor)
    with torch.no_grad():
        return _median_seconds(lambda: torch.mm(factor, factor.T, out=product), lasting)


def _median_seconds(work: Callable[[], object], lasting: float) -> float:
    """Median time of a call of `work`, called for `lasting` seconds, after one not counted."""
    work()
    times: list[float] = []
    begin = time.perf_counter()
    while not times or time.perf_counter() - begin < lasting:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
