# SPDX-License-Identifier: Apache-2.0
"""Megatron's flags on a machine without a GPU: what is added, and what cannot be served.

Pure Python: imports neither torch nor Megatron.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_seqpar.errors import UnsupportedError


@dataclass(frozen=True)
class Addition:
    """A flag that the CPU needs. `value` is None for a switch."""

    flag: str
    value: str | None
    why: str

    @property
    def tokens(self) -> list[str]:
        """The flag as it stands on a command line."""
        return [self.flag] if self.value is None else [self.flag, self.value]


ADDITIONS = (
    Addition("--transformer-impl", "local", "Transformer Engine needs CUDA"),
    Addition("--distributed-backend", "gloo", "NCCL needs CUDA"),
    Addition("--no-gradient-accumulation-fusion", None, "a CUDA extension of apex"),
    Addition("--no-masked-softmax-fusion", None, "a CUDA extension of Megatron"),
    Addition("--no-rope-fusion", None, "a kernel of Transformer Engine"),
)


@dataclass(frozen=True)
class Refusal:
    """A flag that a CPU cannot serve; `allowed` are the values that it can."""

    flag: str
    instead: str
    allowed: tuple[str, ...] = ()


_DROP = "leave it out, or run on a GPU"
REFUSALS = (
    Refusal("--transformer-impl", "use --transformer-impl local", ("local",)),
    Refusal("--distributed-backend", "use --distributed-backend gloo", ("gloo",)),
    Refusal("--fp8-format", "use --bf16"),
    Refusal("--fp8-param-gather", _DROP),
    Refusal("--fp4-format", "use --bf16"),
    Refusal("--fp4-param-gather", _DROP),
    Refusal("--use-transformer-engine-op-fuser", _DROP),
    Refusal("--use-precision-aware-optimizer", "use --use-distributed-optimizer alone"),
    Refusal("--use-torch-fsdp2", "use --use-distributed-optimizer"),
    Refusal("--use-megatron-fsdp", "use --use-distributed-optimizer"),
    Refusal("--use-custom-fsdp", "use --use-distributed-optimizer"),
    Refusal("--enable-cuda-graph", _DROP),
    Refusal("--external-cuda-graph", _DROP),
    Refusal("--optimizer-cuda-graph", _DROP),
    Refusal("--cuda-graph-impl", "use --cuda-graph-impl none", ("none",)),
    Refusal("--tp-comm-overlap", _DROP),
    Refusal("--use-nccl-ub", _DROP),
    Refusal("--use-sharp", _DROP),
    Refusal("--nccl-communicator-config-path", _DROP),
    Refusal("--high-priority-stream-groups", _DROP),
    Refusal("--cross-entropy-fusion-impl", "use --cross-entropy-fusion-impl native", ("native",)),
    Refusal("--moe-permute-fusion", _DROP),
    Refusal("--moe-router-fusion", _DROP),
    Refusal("--moe-enable-deepep", "use --moe-token-dispatcher-type alltoall"),
    Refusal(
        "--moe-token-dispatcher-type",
        "use --moe-token-dispatcher-type alltoall",
        ("alltoall", "allgather"),
    ),
)


def given(argv: Sequence[str], flag: str) -> str | None:
    """The last value of `flag` in `argv`, '' for a switch, None where it is absent."""
    found = None
    for index, token in enumerate(argv):
        if token == flag:
            following = argv[index + 1] if index + 1 < len(argv) else ""
            found = "" if following.startswith("--") else following
        elif token.startswith(flag + "="):
            found = token[len(flag) + 1 :]
    return found


def cpu_arguments(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Megatron's command line with what a CPU needs, and one note for each flag that was added.

    Flags of the user's stay as they are. Raises UnsupportedError for one that a CPU cannot serve,
    naming the flag, its value and what to use instead.
    """
    for refusal in REFUSALS:
        value = given(argv, refusal.flag)
        if value is not None and value not in refusal.allowed:
            shown = f"{refusal.flag} {value}".rstrip() if refusal.allowed else refusal.flag
            raise UnsupportedError(f"{shown} needs a GPU and this run has none; {refusal.instead}")
    result, notes = list(argv), []
    for addition in ADDITIONS:
        if given(argv, addition.flag) is None:
            result += addition.tokens
            notes.append(f"{' '.join(addition.tokens)} ({addition.why})")
    return result, notes
