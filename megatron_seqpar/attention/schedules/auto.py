# SPDX-License-Identifier: Apache-2.0
"""`auto`: build every schedule that serves the problem, cost each, take the best and say why.

By time (the default) the cost is a replay of both passes on a description of the cluster: kernel
time by tile shape, links by pair, message overhead, waits (`simulate/`). By bytes it is what all
ranks send in both passes, then what the busiest sends. The choice is the least of the candidates,
so it is never worse than the best fixed choice in the model.

Every rank must come to the same choice: nothing here looks at the machine. Who knows the cluster
hands it in; otherwise a description by device type stands for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from ...errors import ScheduleError
from ...simulate import Cluster, Prediction, load_cluster, predict
from ..ir import Problem, item_size
from ..schedule import Schedule

Objective = Literal["time", "bytes"]
OBJECTIVES = ("time", "bytes")

# what stands for a cluster that nobody described, by device type
STAND_INS = {"cpu": "laptop", "cuda": "dgx-h100"}
# masks of more regions than this are planned anew for every batch: only what is quick to build and
# balances irregular work is tried
MANY_REGIONS = 8
FOR_MANY_REGIONS = ("solver", "allgather")


@dataclass(frozen=True)
class Candidate:
    """One schedule that was looked at.

    Attributes:
        name: of its builder.
        schedule: None when it does not serve the problem.
        refusal: why it does not, or "".
        bytes_total, bytes_busiest: sent in both passes by all ranks, and by the one that sends
            most, for one sample.
        prediction: both passes on the cluster; None when the objective is bytes.
    """

    name: str
    schedule: Schedule | None = None
    refusal: str = ""
    bytes_total: int = 0
    bytes_busiest: int = 0
    prediction: Prediction | None = None

    @property
    def cost(self) -> tuple[float, int, int]:
        """Least is best: (seconds, bytes of all ranks, bytes of the busiest)."""
        seconds = self.prediction.total_s if self.prediction is not None else 0.0
        return seconds, self.bytes_total, self.bytes_busiest


@dataclass(frozen=True)
class Choice:
    """What was chosen from what.

    Attributes:
        candidates: all, the best first, those that do not serve the problem last.
        objective: "time" or "bytes".
        cluster: what the times hold for; None by bytes.
    """

    candidates: tuple[Candidate, ...]
    objective: Objective
    cluster: Cluster | None

    @property
    def schedule(self) -> Schedule:
        """The chosen one."""
        schedule = self.candidates[0].schedule
        assert schedule is not None
        return schedule

    def why(self) -> str:
        """One sentence: the chosen schedule against the runner-up."""
        best, *others = (c for c in self.candidates if c.schedule is not None)
        if not others:
            return f"{best.name}: the only schedule that serves this"
        next_best = others[0]
        if best.prediction is None or next_best.prediction is None:
            share = best.bytes_total / max(1, next_best.bytes_total)
            return f"{best.name}: sends {share:.3f} of what {next_best.name} sends"
        ratio = next_best.prediction.total_s / best.prediction.total_s
        where = "" if self.cluster is None else f" on {self.cluster.name}"
        return (
            f"{best.name}: {milliseconds(best.prediction.total_s)} a layer{where} in the model, "
            f"{next_best.name} {ratio:.2f} x that"
        )


def milliseconds(seconds: float) -> str:
    """Milliseconds with three digits, or all before the point: 0.327 ms, 31.9 ms, 1,074 ms."""
    ms = seconds * 1e3
    return f"{ms:,.0f} ms" if ms >= 100 else f"{ms:.3g} ms"


def choose(
    problem: Problem,
    build: Callable[[str, Problem], Schedule],
    names: Sequence[str],
    *,
    objective: Objective = "time",
    cluster: Cluster | None = None,
    dtype: object = "bfloat16",
    device: str = "cuda",
    batch: int = 1,
) -> Choice:
    """Look at the candidates.

    Args:
        problem: what is to be computed.
        build: builds (or takes from a cache) the schedule of a name.
        names: the builders there are.
        objective: "time" or "bytes".
        cluster: what runs it; None for the stand-in of the device type.
        dtype: of q, k and v.
        device: "cuda" or "cpu", for the stand-in.
        batch: samples of one call.

    Raises:
        ScheduleError: an unknown objective, or nothing serves the problem.
    """
    if objective not in OBJECTIVES:
        raise ScheduleError(f"objective={objective!r}: use one of {', '.join(OBJECTIVES)}")
    if objective == "time":
        cluster = cluster or load_cluster(STAND_INS.get(device, STAND_INS["cuda"]))
        cluster = cluster.with_ranks_per_node(problem.node_size)
    else:
        cluster = None
    looked_at = [
        _look(name, problem, build, cluster, dtype, batch) for name in _worth(problem, names)
    ]
    served = sorted((c for c in looked_at if c.schedule is not None), key=lambda c: c.cost)
    if not served:
        raise ScheduleError("no schedule serves this: " + "; ".join(c.refusal for c in looked_at))
    refused = [c for c in looked_at if c.schedule is None]
    return Choice((*served, *refused), objective, cluster)


def _worth(problem: Problem, names: Sequence[str]) -> Iterable[str]:
    """The candidates worth building."""
    if problem.size == 1:
        return ("allgather",)  # one rank computes each region in one tile
    if len(problem.index.regions) > MANY_REGIONS:
        return [name for name in names if name in FOR_MANY_REGIONS]
    return names


def _look(
    name: str,
    problem: Problem,
    build: Callable[[str, Problem], Schedule],
    cluster: Cluster | None,
    dtype: object,
    batch: int,
) -> Candidate:
    try:
        schedule = build(name, problem)
    except ScheduleError as refusal:
        return Candidate(name, refusal=str(refusal))
    item, ranks = item_size(dtype), range(problem.size)
    sent = [sum(schedule.bytes_sent(r, d, item) for d in ("forward", "backward")) for r in ranks]
    prediction = None if cluster is None else predict(schedule, cluster, dtype, batch)
    return Candidate(name, schedule, "", sum(sent), max(sent), prediction)
