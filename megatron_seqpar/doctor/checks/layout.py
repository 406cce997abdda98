# SPDX-License-Identifier: Apache-2.0
"""Which global ranks form the groups of each axis?"""

from __future__ import annotations

from ..finding import Asked, Finding, Status
from ..machine import Machine

SHOWN_GROUPS = 8


def groups(world: int, tp: int, sp: int, pp: int) -> dict[str, list[list[int]]]:
    """Axis -> its groups of global ranks, as Megatron makes them with its default order.

    global rank = tp + TP * (sp + SP * (dp + DP * pp)); `world` is a multiple of TP x SP x PP.
    """
    sizes = {"TP": tp, "SP": sp, "DP": world // (tp * sp * pp), "PP": pp}
    strides, stride = {}, 1
    for axis, size in sizes.items():
        strides[axis] = stride
        stride *= size
    return {
        axis: [
            [first + strides[axis] * place for place in range(size)]
            for first in range(world)
            if first // strides[axis] % size == 0
        ]
        for axis, size in sizes.items()
    }


def check(asked: Asked, machine: Machine) -> Finding:
    """The groups of the world that was asked for; a problem where the sizes do not divide it."""
    sizes = {"--tp": asked.tp, "--sp": asked.sp, "--pp": asked.pp}
    unit = asked.tp * asked.sp * asked.pp
    world = asked.world if asked.world is not None else max(unit, asked.nproc - asked.nproc % unit)
    product = " x ".join(f"{option[2:].upper()} {size}" for option, size in sizes.items())
    if world % unit:
        below, above = world - world % unit, world - world % unit + unit
        nearest = [count for count in (below, above) if count]
        return Finding(
            "layout",
            Status.PROBLEM,
            f"{world} processes are not a multiple of {product} = {unit}",
            fix=f"start {' or '.join(map(str, nearest))} processes: "
            f"megatron-seqpar run --nproc {nearest[0]} SCRIPT --tensor-model-parallel-size "
            f"{asked.tp} --sequence-parallel-size {asked.sp} --pipeline-model-parallel-size "
            f"{asked.pp}",
        )
    found = groups(world, asked.tp, asked.sp, asked.pp)
    text = f"{world} processes: {product}, DP {world // unit}"
    details = tuple(_line(axis, found[axis]) for axis in found)
    return Finding("layout", Status.OK, text, details=details, data={"world": world, **found})


def _line(axis: str, members: list[list[int]]) -> str:
    """'TP: [0 1] [2 3]'."""
    if len(members[0]) == 1:
        return f"{axis}: each rank alone"
    shown = " ".join(f"[{_ranks(ranks)}]" for ranks in members[:SHOWN_GROUPS])
    more = len(members) - SHOWN_GROUPS
    return f"{axis}: {shown}" + (f" and {more} more" if more > 0 else "")


def _ranks(ranks: list[int]) -> str:
    if len(ranks) <= SHOWN_GROUPS:
        return " ".join(map(str, ranks))
    return f"{ranks[0]} {ranks[1]} ... {ranks[-1]}"
