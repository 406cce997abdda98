# SPDX-License-Identifier: Apache-2.0
"""Eight ranks on one GPU, each with a compute and a transfer stream: is everything in order?

Ranks are threads, transfers are copies on the device, and `stress` makes races show. Three checks:

1. messages alone, over and over in the same buffers: every number must be right;
2. the same with each rule on streams left out in turn: it must be noticed, or check 1 says nothing;
3. distributed attention, forward and backward, with every schedule and mask that go together:
   in fp64 equal to one device's to 1e-8, in bf16 within twice the error of plain attention.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu.environment import found_kernels
from benchmarks.gpu.settings import Outcome, Scale, Settings
from benchmarks.gpu.stress import FAULTS_WITHOUT_STREAMS, Fault, passing_around, stressed
from benchmarks.gpu.truth import (
    LIMIT,
    Inputs,
    Results,
    Shape,
    attention,
    error_ratios,
    inputs,
    largest_difference,
    seen,
)
from megatron_seqpar.attention import (
    Causal,
    Documents,
    Full,
    Mask,
    Prefix,
    SlidingWindow,
    ThreadTransport,
    TokenLayout,
    build_schedule,
    dist_flash_attention,
)
from megatron_seqpar.attention.schedules import names
from megatron_seqpar.errors import ScheduleError, SeqParError

EXACT = 1e-8
TRIES = 8  # to see a fault
TIMEOUT = 60.0


@dataclass(frozen=True)
class Combination:
    """A schedule, a token layout and a mask."""

    schedule: str
    token_layout: str
    mask_name: str
    mask: Mask
    node_size: int | None

    def __str__(self) -> str:
        nodes = f", nodes of {self.node_size}" if self.node_size else ""
        return f"{self.schedule}, {self.token_layout}, {self.mask_name}{nodes}"


@dataclass(frozen=True)
class Problem:
    """What the ranks compute: `size` ranks, sizes of heads, the length of the sequence."""

    size: int
    shape: Shape

    def layout(self, name: str) -> TokenLayout:
        """The token layout of that name; chunks differ in length."""
        tokens = self.shape.tokens[0]
        if name == "zigzag":
            return TokenLayout.zigzag(self.size, tokens)
        return TokenLayout.contiguous(self.size, seq_length=tokens)

    def masks(self) -> dict[str, Mask]:
        """The masks by name."""
        n = self.shape.tokens[0]
        ends = (0, n // 9, n // 9 + 1, n // 3, n // 3 + n // 16, n)
        return {
            "causal": Causal(),
            "full": Full(),
            "window": SlidingWindow(n // 5),
            "window to both sides, sinks": SlidingWindow(n // 9, n // 16, 3),
            "prefix": Prefix(n // 3),
            "documents": Documents(ends),
            "documents, window": Documents(ends, SlidingWindow(n // 8)),
        }

    def combinations(self) -> Iterator[Combination | str]:
        """Those that can be built; of the others, why not."""
        nodes = (self.size // 2,) if self.size % 2 == 0 else ()
        for schedule, layout, (name, mask) in itertools.product(
            names(), ("contiguous", "zigzag"), self.masks().items()
        ):
            # hybrid schedules need nodes, "auto" may use them, the others know none
            sizes = nodes if "+" in schedule else (None, *nodes) if schedule == "auto" else (None,)
            for node_size in sizes:
                one = Combination(schedule, layout, name, mask, node_size)
                try:
                    self._build(one)
                except ScheduleError as reason:
                    yield f"{one}: {reason}"
                else:
                    yield one

    def _build(self, one: Combination) -> None:
        build_schedule(
            one.schedule,
            layout=self.layout(one.token_layout),
            mask=one.mask,
            node_size=one.node_size,
            query_heads=self.shape.heads,
            kv_heads=self.shape.kv_heads,
            head_dim=self.shape.dim,
        )


def over_ranks(
    data: Inputs, problem: Problem, one: Combination, kernel: str, group: type[ThreadTransport]
) -> Results:
    """Attention of `data` over `problem.size` threads, and the pieces put together."""
    device = data.q.device
    layout = problem.layout(one.token_layout)
    places = [
        torch.cat([torch.arange(*span, device=device) for span in spans]) for spans in layout.pieces
    ]

    def work(transport: ThreadTransport) -> Results:
        mine = places[transport.rank]
        q, k, v = leaves = [t[:, mine].requires_grad_() for t in data[:3]]
        result = dist_flash_attention(
            q, k, v, group=transport, mask=one.mask, schedule=one.schedule,
            token_layout=one.token_layout, lengths=layout.lengths, node_size=one.node_size,
            kernel=kernel, return_lse=True,
        )  # fmt: skip
        assert isinstance(result, tuple)
        out, lse = result
        return Results(out.detach(), lse, *torch.autograd.grad(out, leaves, data.dout[:, mine]))

    parts = group.run(problem.size, work, device=device, timeout=TIMEOUT)
    order = torch.argsort(torch.cat(places))
    return Results(
        *(
            torch.cat(fields, dim).index_select(dim, order)
            for dim, fields in zip((1, 2, 1, 1, 1), zip(*parts, strict=True), strict=True)
        )
    )


@dataclass
class Truths:
    """The truth of every mask for one set of inputs, computed when first asked for."""

    data: Inputs
    problem: Problem
    known: dict[str, tuple[Results, Results]]

    def of(self, one: Combination) -> tuple[Results, Results]:
        """(in fp64, by plain attention in the inputs' dtype)."""
        if one.mask_name not in self.known:
            tokens = self.problem.shape.tokens
            pairs = seen(one.mask.regions(tokens[0]), tokens, self.data.q.device)
            scale = self.problem.shape.dim**-0.5
            self.known[one.mask_name] = (
                attention(self.data, pairs, torch.float64, scale),
                attention(self.data, pairs, self.data.q.dtype, scale),
            )
        return self.known[one.mask_name]


def _messages(settings: Settings, outcome: Outcome, size: int) -> None:
    """Checks 1 and 2."""
    steps = settings.pick(full=200, quick=50, tiny=12)
    count = 1 << (18 if settings.on_gpu else 8)
    # on the CPU a thread sleeps in place of a stream, and wakes up late
    longest = 3e-4 if settings.on_gpu else 1e-3

    def wrong(seed: int, fault: Fault | None) -> int:
        group = stressed(seed, longest, fault)
        counts = group.run(
            size, lambda t: passing_around(t, settings.device, steps, count),
            device=settings.device, timeout=TIMEOUT,
        )  # fmt: skip
        return sum(counts)

    repeats = settings.pick(full=10, quick=4, tiny=2)
    found = [wrong(seed, None) for seed in range(repeats)]
    outcome.data["messages"] = {"runs": repeats, "steps": steps, "wrong_numbers": found}
    if any(found):
        outcome.failures.append(f"messages: wrong numbers in {repeats} runs: {found}")
    noticed: dict[str, int | None] = {}
    for fault in Fault if settings.on_gpu else FAULTS_WITHOUT_STREAMS:
        noticed[fault.value] = next((t + 1 for t in range(TRIES) if wrong(t, fault)), None)
        if noticed[fault.value] is None:
            outcome.failures.append(f"messages: not noticed in {TRIES} runs: {fault.value}")
    outcome.data["messages"]["runs_to_notice"] = noticed


def _faulty_attention(settings: Settings, outcome: Outcome, problem: Problem) -> None:
    """Whether the third check would notice an executor that does not wait for what it receives."""
    data = inputs(problem.shape, torch.float64, settings.device)
    one = Combination("balanced", "contiguous", "causal", Causal(), None)
    truth, _ = Truths(data, problem, {}).of(one)
    noticed = None
    for attempt in range(TRIES):
        group = stressed(attempt, 1e-3, Fault.RECEIVE_NOT_AWAITED)
        try:
            wrong = largest_difference(over_ranks(data, problem, one, "reference", group), truth)
        except SeqParError:  # ranks out of step: noticed as well
            wrong = float("inf")
        if wrong > EXACT:
            noticed = attempt + 1
            break
    outcome.data["attention_runs_to_notice"] = noticed
    if noticed is None:
        outcome.failures.append(f"attention: not noticed in {TRIES} runs: reads without waiting")


def _attention(settings: Settings, outcome: Outcome, problem: Problem) -> None:
    """Check 3."""
    repeats = settings.pick(full=4, quick=2, tiny=1)
    longest = 2e-4 if settings.on_gpu else 5e-4
    # cuDNN builds its plans anew in every new thread, which takes longer than all the rest
    fast = next((name for name in found_kernels(settings.device) if name != "cudnn"), "auto")
    ways: list[tuple[str, str, torch.dtype]] = [("fp64", "reference", torch.float64)]
    ways.append(("bf16", fast, settings.half))
    outcome.data["kernel"] = fast
    listed = list(problem.combinations())
    combinations = [one for one in listed if isinstance(one, Combination)]
    if settings.scale is Scale.TINY:
        combinations = combinations[::3]
    outcome.data["not_served"] = [one for one in listed if isinstance(one, str)]
    rows: dict[str, dict[str, Any]] = {}
    truths = {
        way: Truths(inputs(problem.shape, dtype, settings.device), problem, {})
        for way, _, dtype in ways
    }
    cut = 0
    for repeat, one, (way, kernel, _) in itertools.product(range(repeats), combinations, ways):
        if settings.time_is_up:
            cut += 1
            continue
        row = rows.setdefault(f"{one}, {way}", {"runs": 0, "worst": 0.0})
        exact, plain = truths[way].of(one)
        group = stressed(repeat * 1000 + len(rows), longest)
        try:
            got = over_ranks(truths[way].data, problem, one, kernel, group)
        except SeqParError as failure:
            outcome.failures.append(f"{one}, {way}: {failure}")
            continue
        if way == "fp64":
            value, limit = largest_difference(got, exact), EXACT
        else:
            value, limit = max(error_ratios(got, plain, exact).values()), LIMIT
        row["runs"] += 1
        row["worst"] = max(row["worst"], value)
        if not value <= limit:
            outcome.failures.append(f"{one}, {way}, run {repeat}: {value:.3g} over {limit:g}")
    if cut:
        outcome.left_out.append(f"{cut} of the runs of attention: no time")
    outcome.data["attention"] = rows


def run(settings: Settings) -> Outcome:
    """All three checks."""
    outcome = Outcome()
    size = settings.pick(full=8, quick=8, tiny=4)
    tokens = settings.pick(full=1021, quick=1021, tiny=61)
    heads, kv_heads = settings.pick(full=(16, 8), quick=(16, 8), tiny=(4, 2))
    dim = settings.pick(full=64, quick=64, tiny=16)
    problem = Problem(size, Shape((tokens, tokens), heads, kv_heads, dim, dim))
    _messages(settings, outcome, size)
    _faulty_attention(settings, outcome, problem)
    _attention(settings, outcome, problem)
    rows = outcome.data["attention"]
    worst = {
        way: max((row["worst"] for name, row in rows.items() if name.endswith(way)), default=0.0)
        for way in ("fp64", "bf16")
    }
    outcome.data["worst"] = worst
    runs = sum(row["runs"] for row in rows.values())
    outcome.says = (
        f"{size} ranks, {len(rows) // 2} schedules x masks, {runs} stressed runs: fp64 to "
        f"{worst['fp64']:.1e}, bf16 {worst['bf16']:.2f} x plain attention's error"
    )
    return outcome
