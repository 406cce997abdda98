# SPDX-License-Identifier: Apache-2.0
"""Every setting of the plugin, in one frozen dataclass.

Each field carries the command line flag it is generated from, its help text and its choices, so
that a flag, its default and its documentation cannot drift apart. Nothing here imports torch or
Megatron: the dataclass is what the launcher, the integration and the tests hand around, and its
values are plain Python types because Megatron pickles its argument namespace into checkpoints.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from megatron_seqpar.attention import masks, schedules
from megatron_seqpar.errors import ScheduleError, UnsupportedError

GROUP_TITLE = "sequence parallel (megatron_seqpar)"


def _flag(
    default: Any,
    flag: str,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    metavar: str | None = None,
    negated: bool = False,
    number: Callable[[str], Any] | None = None,
) -> Any:
    """A dataclass field with the metadata that `add_arguments` and `from_namespace` read.

    number: int or float, for a field whose text is one.
    """
    metadata = {
        "flag": flag,
        "help": help,
        "choices": choices,
        "metavar": metavar,
        "negated": negated,
        "number": number,
    }
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class SeqParConfig:
    """Settings of the sequence-parallel (SP) axis.

    Raises `UnsupportedError` when a value is not one of its choices or a size is below 1.
    Kernel names are checked where the kernels are known, in `megatron_seqpar.attention`.
    """

    sequence_parallel_size: int = _flag(
        1,
        "--sequence-parallel-size",
        "Number of ranks over which each sequence is split into contiguous chunks. "
        "1 leaves Megatron as it is. Not to be confused with --sequence-parallel, which splits "
        "norm and dropout activations over the tensor-parallel group.",
        metavar="N",
        number=int,
    )
    schedule: str = _flag(
        "auto",
        "--seqpar-schedule",
        "Who computes which attention tile when, and what moves. 'auto' chooses by the mask, the "
        "sizes and the machine; the choice is printed before the first step.",
        choices=schedules.names(),
    )
    token_layout: str = _flag(
        "contiguous",
        "--seqpar-token-layout",
        "Which tokens a rank owns. 'contiguous': one chunk each. 'zigzag': an early and a late "
        "chunk each, as Megatron's own context parallelism cuts them.",
        choices=("contiguous", "zigzag"),
    )
    mask: str = _flag(
        "causal",
        "--seqpar-mask",
        "Which tokens attend to which, where Megatron's layers ask for causal attention: causal, "
        "full, window:LEFT[,RIGHT[,SINKS]] or prefix:LENGTH. Any but causal uses our core "
        "attention with --sequence-parallel-size 1 too.",
        metavar="TEXT",
    )
    softcap: float = _flag(
        0.0,
        "--seqpar-softcap",
        "Bound attention logits smoothly to +-C, as C * tanh(logit / C); 0 for no bound. It uses "
        "our core attention with --sequence-parallel-size 1 too.",
        metavar="C",
        number=float,
    )
    kernel: str = _flag(
        "auto",
        "--seqpar-kernel",
        "Attention kernel. 'auto' takes the best one for the device, dtype and head dimension; "
        "a named one is used or refused, never replaced. Naming one with "
        "--sequence-parallel-size 1 uses it as Megatron's core attention.",
        metavar="NAME",
    )
    recompute: str = _flag(
        "none",
        "--seqpar-recompute",
        "What is computed again in backward. 'mlp': the MLP. 'attention-qkv': all but what "
        "attention's backward wants, so queries, keys, values and its output are kept. "
        "'attention-output': all but attention, whose output alone is kept. It takes the place of "
        "Megatron's --recompute-granularity, and attention and its transfers never run again.",
        choices=("none", "mlp", "attention-qkv", "attention-output"),
    )
    mlp_chunks: str = _flag(
        "off",
        "--seqpar-mlp-chunks",
        "Compute MLPs in N pieces of the sequence, so that their intermediate activations are "
        "those of one piece. 'auto' takes as few pieces as the memory budget allows, none if all "
        "fits, and says so before the first step.",
        metavar="{auto,N,off}",
    )
    loss_chunks: str = _flag(
        "off",
        "--seqpar-loss-chunks",
        "Compute logits, cross entropy and their gradients in N pieces of the sequence. 'auto' as "
        "for --seqpar-mlp-chunks.",
        metavar="{auto,N,off}",
    )
    memory_budget: float | None = _flag(
        None,
        "--seqpar-memory-budget",
        "Memory of one rank in GiB that 'auto' chunks reckon with. By default that of its GPU, or "
        "its share of the machine's.",
        metavar="GIB",
        number=float,
    )
    offload: str = _flag(
        "none",
        "--seqpar-offload",
        "'stash' keeps what --seqpar-recompute attention-output keeps of each layer, its input and "
        "attention's output, in pinned host memory until backward wants it.",
        choices=("none", "stash"),
    )
    overlap: bool = _flag(
        True,
        "--seqpar-no-overlap",
        "Wait for every transfer before computing. For measurement: it is slower and gives the "
        "same numbers.",
        negated=True,
    )
    node_size: int | None = _flag(
        None,
        "--seqpar-node-size",
        "Ranks of the axis that share a node's fast links, consecutive ones. By default it "
        "follows from the processes on each node and from tensor parallelism.",
        metavar="N",
        number=int,
    )
    cluster: str | None = _flag(
        None,
        "--seqpar-cluster",
        "Speeds of the machine that 'auto' schedules for: a name or a YAML file. By default what "
        "is found here.",
        metavar="NAME|FILE.yaml",
    )
    report: str | None = _flag(
        None,
        "--seqpar-report",
        "Write losses, gradient norms, step times, peak memory and bytes sent of the run to this "
        "JSON file.",
        metavar="FILE.json",
    )
    peak_tflops: float | None = _flag(
        None,
        "--seqpar-peak-tflops",
        "TFLOP/s that MFU takes for the peak of one device. By default what is published of the "
        "GPU for the dtype of the weights; without a GPU a large matrix product is timed.",
        metavar="TFLOPS",
        number=float,
    )
    summary: bool = _flag(
        True,
        "--seqpar-no-summary",
        "Print no summary of the run when training has ended.",
        negated=True,
    )
    telemetry_interval: float = _flag(
        1.0,
        "--seqpar-telemetry-interval",
        "Seconds between samples of each rank's GPU (memory, power, clock, load, NVLink), where "
        "nvidia-ml-py is installed; 0 for none.",
        metavar="SECONDS",
        number=float,
    )
    trace: str | None = _flag(
        None,
        "--seqpar-trace",
        "Write what every rank does in a training step, tile by tile and transfer by transfer, to "
        "files in this folder that https://ui.perfetto.dev opens.",
        metavar="DIR",
    )
    trace_steps: str = _flag(
        "3",
        "--seqpar-trace-steps",
        "Which steps --seqpar-trace traces, counted from 1: numbers and ranges, such as 3 or "
        "3,10-12.",
        metavar="N[-M],...",
    )

    def __post_init__(self) -> None:
        if self.sequence_parallel_size < 1:
            raise UnsupportedError(
                f"--sequence-parallel-size {self.sequence_parallel_size}: the size must be 1 or "
                "more; 1 turns the axis off."
            )
        if not 0.0 <= self.softcap < float("inf"):
            raise UnsupportedError(
                f"--seqpar-softcap {self.softcap}: the bound must be positive, or 0 for none."
            )
        if self.node_size is not None and (
            self.node_size < 1 or self.sequence_parallel_size % self.node_size
        ):
            raise UnsupportedError(
                f"--seqpar-node-size {self.node_size} with --sequence-parallel-size "
                f"{self.sequence_parallel_size}: every node must hold as many ranks of the axis; "
                "use a divisor of the size."
            )
        for name in ("mlp_chunks", "loss_chunks"):
            chunk_count(self, name)
        if self.memory_budget is not None and not 0.0 < self.memory_budget < float("inf"):
            raise UnsupportedError(
                f"--seqpar-memory-budget {self.memory_budget}: the budget must be positive, in GiB."
            )
        if self.peak_tflops is not None and not 0.0 < self.peak_tflops < float("inf"):
            raise UnsupportedError(
                f"--seqpar-peak-tflops {self.peak_tflops}: the peak must be positive, in TFLOP/s."
            )
        if not 0.0 <= self.telemetry_interval < float("inf"):
            raise UnsupportedError(
                f"--seqpar-telemetry-interval {self.telemetry_interval}: seconds must be positive, "
                "or 0 for no telemetry."
            )
        try:
            masks.as_mask(self.mask)
        except ScheduleError as error:
            raise UnsupportedError(f"--seqpar-mask {self.mask}: {error}.") from error
        for field in dataclasses.fields(self):
            choices = field.metadata["choices"]
            value = getattr(self, field.name)
            if choices is not None and value not in choices:
                raise UnsupportedError(
                    f"{field.metadata['flag']} {value}: unknown value. Use one of: "
                    f"{', '.join(choices)}."
                )
        if self.offload != "none" and self.recompute != "attention-output":
            raise UnsupportedError(
                f"--seqpar-offload {self.offload} with --seqpar-recompute {self.recompute}: it "
                "moves what a layer keeps that is run again whole. Add --seqpar-recompute "
                "attention-output, or drop --seqpar-offload."
            )
        self.traced(1)  # checks the ranges

    def traced(self, step: int) -> bool:
        """Whether `trace_steps` names a step; steps count from 1."""
        named = False
        for part in self.trace_steps.split(","):
            first, dash, last = part.strip().partition("-")
            try:
                low, high = int(first), int(last if dash else first)
            except ValueError:
                low, high = 1, 0
            if not 1 <= low <= high:
                raise UnsupportedError(
                    f"--seqpar-trace-steps {self.trace_steps}: {part!r} is neither a step nor a "
                    "range of steps. Steps count from 1: use 3, 3-5 or 3,10-12."
                )
            named = named or low <= step <= high
        return named

    @property
    def active(self) -> bool:
        """Whether the axis has more than one rank."""
        return self.sequence_parallel_size > 1

    @property
    def keeps_attention(self) -> bool:
        """Whether what attention returns is kept while other parts of a layer are repeated."""
        return self.recompute in ("attention-qkv", "attention-output")

    @property
    def replaces_core_attention(self) -> bool:
        """Whether Megatron's core attention gives way to ours.

        With one rank that happens when a kernel is named, so that size 1 and stock tensor
        parallelism can be compared with the axis on the very same attention kernel, when our
        recomputation is asked for, which needs what our attention returns, and for a mask or a
        bound on logits that Megatron's attention does not have.
        """
        return self.active or self.reason_without_axis is not None

    @property
    def reason_without_axis(self) -> str | None:
        """The first flag, with its value, that asks for our core attention whatever the size."""
        names = ["kernel", "mask", "softcap"]
        if self.keeps_attention:
            names.append("recompute")
        asked = (as_typed(self, name) for name in names if not is_default(self, name))
        return next(asked, None)


FIELDS = {field.name: field for field in dataclasses.fields(SeqParConfig)}


def is_default(config: SeqParConfig, field_name: str) -> bool:
    """Whether a setting has the value it has when its flag is not given."""
    return bool(getattr(config, field_name) == FIELDS[field_name].default)


AUTO = "auto"


def chunk_count(config: SeqParConfig, field_name: str) -> int | None:
    """How many pieces `mlp_chunks` or `loss_chunks` asks for; 0 for off, None for auto.

    Raises `UnsupportedError` for any other text.
    """
    text = getattr(config, field_name).strip()
    if text == AUTO:
        return None
    if text == "off":
        return 0
    if not text.isdecimal() or int(text) < 1:
        raise UnsupportedError(
            f"{as_typed(config, field_name)}: neither auto, off nor a number of pieces. "
            "Use auto, off or 1 or more."
        )
    return int(text)


def as_typed(config: SeqParConfig, field_name: str) -> str:
    """A setting as the user types it, e.g. '--seqpar-mask prefix:64'."""
    return f"{FIELDS[field_name].metadata['flag']} {getattr(config, field_name)}"


def destination(field_name: str) -> str:
    """The argparse destination of a field: its own name for the size, `seqpar_*` for the rest."""
    return field_name if field_name == "sequence_parallel_size" else f"seqpar_{field_name}"


def add_arguments(
    parser: argparse.ArgumentParser, defaults: SeqParConfig | None = None
) -> argparse.ArgumentParser:
    """Add one flag a field to `parser`, under a group of their own; returns the parser.

    Choices are stated in the help text and checked by `SeqParConfig`, not by argparse, whose
    error would print Megatron's whole usage.
    """
    defaults = defaults or SeqParConfig()
    group = parser.add_argument_group(title=GROUP_TITLE)
    for field in dataclasses.fields(SeqParConfig):
        meta: Mapping[str, Any] = field.metadata
        default = getattr(defaults, field.name)
        keywords: dict[str, Any] = {
            "dest": destination(field.name),
            "default": default,
            "help": meta["help"],
        }
        if meta["negated"]:
            keywords["action"] = "store_false"
        else:
            # A wrong number is reported by `from_namespace`, like every other wrong value.
            keywords["type"] = str
            keywords["metavar"] = meta["metavar"]
            if meta["choices"] is not None:
                keywords["metavar"] = "{" + ",".join(meta["choices"]) + "}"
        group.add_argument(meta["flag"], **keywords)
    return parser


def from_namespace(namespace: Any) -> SeqParConfig:
    """The config that parsed arguments ask for.

    Raises `UnsupportedError` for values outside a field's choices.
    """
    values = {
        field.name: getattr(namespace, destination(field.name))
        for field in dataclasses.fields(SeqParConfig)
        if hasattr(namespace, destination(field.name))
    }
    for name, value in values.items():
        meta = FIELDS[name].metadata
        if meta["number"] is None or value is None:
            continue
        try:
            values[name] = meta["number"](value)
        except ValueError:
            example = "1 or more" if meta["number"] is int else "one, like 50.0"
            raise UnsupportedError(
                f"{meta['flag']} {value}: not a number. Use {example}."
            ) from None
    return SeqParConfig(**values)
