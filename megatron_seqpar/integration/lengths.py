# SPDX-License-Identifier: Apache-2.0
"""Sizes that must divide, checked with numbers before anything is built."""

from __future__ import annotations

import math
from typing import Any

from megatron_seqpar.errors import UnsupportedError


def sequence_length(args: Any) -> int | None:
    """The length of a training sequence in tokens, whichever flag gave it."""
    length = getattr(args, "seq_length", None)
    return length if length is not None else getattr(args, "encoder_seq_length", None)


def check_sequence_length(
    length: int, size: int, tensor_parallel: int = 1, *, zigzag: bool = False
) -> None:
    """Refuse a sequence that does not split into equal chunks.

    length: tokens in a sequence. size: P, ranks on the SP axis. tensor_parallel: ranks over which
    --sequence-parallel (TP-SP) splits each rank's tokens again; 1 when it is off. zigzag: every
    rank owns two chunks, not one.
    Raises `UnsupportedError` naming the nearest lengths that work.
    """
    unit = size * math.lcm(2 if zigzag else 1, tensor_parallel)
    if length < size:
        raise UnsupportedError(
            f"--seq-length {length} with --sequence-parallel-size {size}: the sequence is "
            f"shorter than the axis. Use at least {unit} tokens or a smaller "
            "--sequence-parallel-size."
        )
    if length % unit:
        below, above = length - length % unit, length - length % unit + unit
        nearest = f"{below} or {above}" if below else f"{above}"
        why = f"{2 * size} chunks, two a rank" if zigzag else f"{size} chunks"
        if tensor_parallel > 1:
            why += f", each split by --sequence-parallel over {tensor_parallel} tensor ranks"
        raise UnsupportedError(
            f"--seq-length {length} with --sequence-parallel-size {size}: training needs equal "
            f"chunks ({why}). The nearest lengths that work: {nearest}."
        )


def check_world_size(world: int, size: int, tensor_parallel: int, pipeline_parallel: int) -> None:
    """Refuse a number of processes that the parallel layout does not divide.

    Raises `UnsupportedError` with the numbers.
    """
    unit = size * tensor_parallel * pipeline_parallel
    if world % unit:
        below = world - world % unit
        nearest = f"{below} or {below + unit}" if below else f"{unit}"
        raise UnsupportedError(
            f"--sequence-parallel-size {size} with --tensor-model-parallel-size "
            f"{tensor_parallel} and --pipeline-model-parallel-size {pipeline_parallel} needs a "
            f"multiple of {unit} processes, but {world} were started. Start {nearest}, or change "
            "a size."
        )
