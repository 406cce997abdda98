# SPDX-License-Identifier: Apache-2.0
"""Builders against what they promise: proof, balance and volume, at every size to 64."""

import random
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_seqpar.attention import (
    Causal,
    Documents,
    Full,
    Mask,
    Payload,
    Prefix,
    Route,
    Schedule,
    SlidingWindow,
    TokenLayout,
    build_schedule,
    even_lengths,
)
from megatron_seqpar.attention.schedules import BUILDERS, names
from megatron_seqpar.errors import ScheduleError
from tests.support.masks import masks

SIZES = (*range(1, 21), 24, 27, 32, 33, 40, 48, 63, 64)
ANY_MASK = [name for name in BUILDERS if "balanced" not in name]
MASKS = [
    Causal(),
    Full(),
    SlidingWindow(9),
    SlidingWindow(5, 2, 3),
    Prefix(20),
    Documents((0, 3, 4, 30, 31)),
    Documents((0, 11, 40), SlidingWindow(4)),
]


def _prove(plan: Schedule) -> None:
    assert plan.verify()
    assert plan.backward().verify()
    assert plan.total_work == plan.problem.total_work


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param((*range(1, 18), 24, 33), id="to33"),
        pytest.param((64,), id="64", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", names())
def test_every_size_is_proved_in_both_directions(name: str, sizes: tuple[int, ...]) -> None:
    for size in sizes:
        inner = [m for m in range(2, size) if size % m == 0]
        if "+" in name and not inner:
            continue
        for mask in (Causal(), Full()):
            _prove(
                build_schedule(
                    name,
                    size=size,
                    seq_length=size * 6 + size // 2,
                    mask=mask,
                    query_heads=8,
                    kv_heads=2,
                    node_size=inner[-1] if "+" in name else None,
                )
            )


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "ragged"])
@pytest.mark.parametrize("mask", MASKS, ids=[f"{mask.name}{i}" for i, mask in enumerate(MASKS)])
def test_every_mask_is_proved_by_the_schedules_that_claim_it(mask: Mask, layout: str) -> None:
    for size in (1, 2, 3, 4, 6, 8):
        token_layout = {
            "contiguous": TokenLayout.contiguous(size, seq_length=43),
            "zigzag": TokenLayout.zigzag(size, 43),
            "ragged": TokenLayout.contiguous(size, lengths=[5 + 7 * r % 11 for r in range(size)]),
        }[layout]
        if layout == "ragged" and token_layout.seq_length < 40:
            continue  # the documents would not fit
        for name in ANY_MASK:
            for node_size in {2, 3, 4} if "+" in name else {size}:
                if size % node_size == 0 and (node_size < size or "+" not in name):
                    _prove(
                        build_schedule(
                            name,
                            layout=token_layout,
                            mask=mask,
                            query_heads=6,
                            kv_heads=2,
                            node_size=node_size,
                        )
                    )


@settings(max_examples=60, deadline=None)
@given(
    masks(40),
    st.sampled_from(ANY_MASK),
    st.integers(1, 8),
    st.booleans(),
    st.sampled_from([(1, 1), (4, 4), (6, 2), (5, 1), (12, 3)]),
    st.integers(1, 4),
)
def test_any_mask_is_proved_by_any_schedule_that_claims_it(
    mask: Mask, name: str, size: int, zigzag: bool, heads: tuple[int, int], nodes: int
) -> None:
    """Hypothesis over the space of masks, with shrinking."""
    if "+" in name:
        size, nodes = size * max(2, nodes), size
        if not 1 < nodes < size:
            return
    layout = TokenLayout.zigzag(size, 40) if zigzag else TokenLayout.contiguous(size, seq_length=40)
    _prove(
        build_schedule(
            name, layout=layout, mask=mask, query_heads=heads[0], kv_heads=heads[1],
            node_size=nodes if "+" in name else None,
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("balanced", {"mask": Prefix(4)}, r"'balanced' does not serve mask 'prefix'; it serves ca"),
        ("ulysses+balanced", {"mask": SlidingWindow(4), "node_size": 2}, r"not serve mask 'window"),
        ("allgather+zigzag", {}, r"'allgather\+zigzag' needs several nodes of several ranks"),
        ("ulysses+zigzag", {"node_size": 1}, r"needs several nodes of several ranks; node_size=1"),
        ("balanced", {"node_size": 3}, r"node_size=3 does not divide the 4 ranks"),
        ("balanced", {"layout": TokenLayout.zigzag(4, 64)}, r"does not serve zigzag token layouts"),
    ],
)
def test_unsupported_pairs_are_refused_by_name(name: str, options: dict, message: str) -> None:
    if "layout" not in options:
        options = {"size": 4, "seq_length": 64} | options
    with pytest.raises(ScheduleError, match=message):
        build_schedule(name, **options)


# ---- balance ----------------------------------------------------------------------------------


def test_balanced_is_never_idle_with_equal_chunks() -> None:
    for size in SIZES:
        plan = build_schedule("balanced", size=size, seq_length=size * 128)
        assert plan.idle_fraction == 0
        assert {plan.work(rank) for rank in range(size)} == {plan.total_work // size}


def test_balanced_work_is_exactly_half_the_axis_in_chunk_units() -> None:
    for size in SIZES:
        chunk = 64
        plan = build_schedule("balanced", size=size, seq_length=size * chunk)
        for rank in range(size):
            off_diagonal = sum(
                tile.pairs for step in plan.steps(rank) for tile in step.tiles if tile.q != tile.kv
            )
            assert Fraction(off_diagonal, chunk * chunk) == Fraction(size - 1, 2)


@pytest.mark.parametrize("chunk", [5, 16, 127])
def test_balanced_stays_near_the_mean_when_lengths_do_not_divide(chunk: int) -> None:
    for size in SIZES:
        for more in {0, 1, size // 2, size - 1}:
            plan = build_schedule("balanced", size=size, seq_length=size * chunk + more)
            mean = plan.total_work / size
            assert max(plan.work(r) for r in range(size)) <= mean * (1 + 2 / chunk)
            assert plan.idle_fraction <= 2 / chunk


def test_zigzag_is_never_idle_with_equal_parts() -> None:
    for size in (*range(1, 18), 24, 33, 64):
        for layout in (
            TokenLayout.zigzag(size, size * 16),
            TokenLayout.contiguous(size, seq_length=size * 16),
        ):
            plan = build_schedule("zigzag", layout=layout)
            assert plan.idle_fraction == 0


@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 8), (33, 33), (40, 8), (8, 1), (1, 1)])
def test_ulysses_is_balanced_whatever_the_head_count(heads: int, kv_heads: int) -> None:
    for size in (2, 3, 5, 8, 16, 64):
        plan = build_schedule(
            "ulysses", size=size, seq_length=size * 512, query_heads=heads, kv_heads=kv_heads
        )
        mean = plan.total_work / size
        # a cut through a head is exact to one row of queries at each of its two ends
        allowed = 0 if heads % size == 0 else 2 * plan.problem.seq_length
        assert max(plan.work(rank) for rank in range(size)) <= mean + allowed


def test_hybrids_are_balanced_among_the_ranks_of_a_node() -> None:
    for name in (name for name in BUILDERS if "+" in name):
        plan = build_schedule(name, size=12, seq_length=12 * 128, query_heads=8, node_size=4)
        assert plan.idle_fraction < 0.02, name


def test_ring_loses_what_the_causal_triangle_costs() -> None:
    for size in SIZES:
        plan = build_schedule("ring", size=size, seq_length=size * 4096)
        assert plan.idle_fraction == pytest.approx((size - 1) / (2 * size - 1), abs=1e-3)


def test_full_masks_are_balanced_either_way() -> None:
    for size in SIZES:
        for name in ("balanced", "ring"):
            plan = build_schedule(name, size=size, seq_length=size * 8, mask=Full())
            assert plan.idle_fraction == 0


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 2), (8, 1)])
def test_forward_volume_is_the_sum_of_the_routes(heads: int, kv_heads: int) -> None:
    """Counted tile by tile: KV-routes 2 Hkv, Q-routes 2 Hq and LSE."""
    chunk, dim, item = 32, 16, 2
    for size in SIZES:
        plan = build_schedule(
            "balanced", size=size, seq_length=size * chunk, query_heads=heads, kv_heads=kv_heads,
            head_dim=dim,
        )  # fmt: skip
        expected = 0
        for rank in range(size):
            for step in plan.steps(rank):
                for tile in step.tiles:
                    if plan.problem.route(rank, tile) is Route.KV:
                        expected += tile.kv.size * 2 * kv_heads * dim * item
                    elif plan.problem.route(rank, tile) is Route.Q:
                        expected += tile.q.size * heads * (2 * dim * item + 4)
        assert sum(plan.bytes_sent(r, "forward", "bfloat16") for r in range(size)) == expected


def test_ring_volume_is_every_chunk_past_every_rank() -> None:
    plan = build_schedule("ring", size=5, seq_length=500, query_heads=4, kv_heads=2, head_dim=8)
    for rank in range(5):
        assert plan.bytes_sent(rank, "forward", "float32") == 4 * 100 * 2 * (8 + 8) * 4
        assert plan.messages_sent(rank, "forward") == 8


def test_backward_q_routes_send_delta_and_not_the_output() -> None:
    plan = build_schedule("balanced", size=2, seq_length=64, query_heads=4, kv_heads=4, head_dim=16)
    # rank 1 sends half its queries: q, dout, and two fp32 numbers a row and head; and gets dq back;
    # it returns the dk and dv of rank 0's whole chunk
    queries = 16 * 4 * (2 * 16 * 2 + 2 * 4)
    assert plan.bytes_sent(1, "backward", "bfloat16") == queries + 32 * 4 * 2 * 16 * 2
    assert plan.bytes_sent(0, "backward", "bfloat16") == 32 * 4 * 2 * 16 * 2 + 16 * 4 * 16 * 2


def test_received_operands_are_bounded_by_two_steps() -> None:
    for size in (2, 3, 8, 64):
        plan = build_schedule("balanced", size=size, seq_length=size * 16, head_dim=8)
        most = max(plan.problem.payload_bytes(payload, 16, 1, 2) for payload in Payload)
        for rank in range(size):
            assert plan.peak_received_bytes(rank) <= 3 * most


def _sent(plan: Schedule, direction: str = "forward") -> list[int]:
    return [plan.bytes_sent(rank, direction, "bfloat16") for rank in range(plan.size)]


def test_direct_zigzag_sends_three_quarters_of_a_ring() -> None:
    """1.5 N Hkv elements of head dim a rank on the mean, for N tokens and many ranks."""
    for size in (2, 8, 64):
        seq_length = size * 32
        layout = TokenLayout.zigzag(size, seq_length)
        options = {"query_heads": 8, "kv_heads": 2, "head_dim": 16}
        zigzag = build_schedule("zigzag", layout=layout, **options)
        ring = build_schedule("ring", layout=layout, **options)
        # of every other rank's two parts a rank sees one or both, half of the time each
        assert sum(_sent(zigzag)) == 0.75 * sum(_sent(ring))
        assert sum(_sent(ring)) == size * (size - 1) * 32 * 2 * 2 * 16 * 2


def test_zigzag_inside_attention_costs_queries_and_outputs_whatever_the_size() -> None:
    """Hq elements a local token (and the LSE), and keys and values as if direct."""
    heads, kv_heads, dim, chunk = 32, 2, 64, 64
    for size in (4, 16, 64):
        plan = build_schedule(
            "zigzag", size=size, seq_length=size * chunk, query_heads=heads, kv_heads=kv_heads,
            head_dim=dim,
        )  # fmt: skip
        moved = dict.fromkeys(Payload, 0)
        for rank in range(size):
            for transfer in plan.transfers(rank):
                moved[transfer.payload] += plan.problem.transfer_bytes(transfer, 2)
        # every rank computes one of its own two parts, and one of somebody else's
        assert moved[Payload.Q] == size * chunk // 2 * heads * dim * 2
        assert moved[Payload.OUT] == size * chunk // 2 * heads * (dim * 2 + 4)
        assert moved[Payload.KV] <= 1.5 * size * size * chunk * kv_heads * dim * 2


def test_allgather_sends_only_what_is_seen() -> None:
    plan = build_schedule("allgather", size=4, seq_length=400, kv_heads=1, head_dim=8)
    chunk = 100 * 2 * 8 * 2
    assert _sent(plan) == [3 * chunk, 2 * chunk, chunk, 0]
    window = build_schedule(
        "allgather", size=4, seq_length=400, kv_heads=1, head_dim=8, mask=SlidingWindow(10)
    )
    assert _sent(window) == [10 * 2 * 8 * 2] * 3 + [0]


def test_ulysses_sends_every_token_once_each_way() -> None:
    size, heads, kv_heads, dim, chunk = 8, 16, 8, 32, 64
    plan = build_schedule(
        "ulysses", size=size, seq_length=size * chunk, query_heads=heads, kv_heads=kv_heads,
        head_dim=dim,
    )  # fmt: skip
    away = chunk * (size - 1) // size
    elements = away * dim * (2 * heads + 2 * kv_heads)
    assert _sent(plan) == [elements * 2 + away * heads * 4] * size


@pytest.mark.parametrize("outer", ["balanced", "zigzag"])
def test_gateways_carry_keys_and_values_once_a_node(outer: str) -> None:
    """With m ranks a node, m times less crosses between nodes than when everybody fetches."""
    size, m = 8, 4
    plan = build_schedule(
        f"allgather+{outer}", size=size, seq_length=size * 64, query_heads=8, kv_heads=2,
        node_size=m, mask=Full(),
    )  # fmt: skip
    across = [
        transfer
        for rank in range(size)
        for transfer in plan.transfers(rank)
        if transfer.payload is Payload.KV and transfer.src // m != transfer.dst // m
    ]
    # each of the two nodes sees the other's tokens: every token crosses once
    assert sum(transfer.span.size for transfer in across) == size * 64
    back = [
        transfer
        for rank in range(size)
        for transfer in plan.backward().transfers(rank)
        if transfer.payload is Payload.DKV and transfer.src // m != transfer.dst // m
    ]
    assert sum(transfer.span.size for transfer in back) == size * 64


def test_auto_leaves_nobody_idle_over_long_sequences() -> None:
    for mask in (Causal(), Full()):
        assert build_schedule("auto", size=4, seq_length=65_536, mask=mask).idle_fraction < 0.01


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"name": "zigzagg"},
            r"schedule='zigzagg' is unknown; use one of auto, balanced, zigzag, ring",
        ),
        ({"seq_length": 3}, r"seq_length=3 is shorter than size=4"),
        ({"query_heads": 6, "kv_heads": 4}, r"query_heads=6 is not a multiple of kv_heads=4"),
        ({"size": 0}, r"at least one rank"),
        ({"head_dim": 0}, r"must be >= 1"),
    ],
)
def test_what_cannot_be_built_is_refused(change: dict, message: str) -> None:
    options = {"name": "balanced", "size": 4, "seq_length": 64} | change
    with pytest.raises(ScheduleError, match=message):
        build_schedule(options.pop("name"), **options)


def test_unknown_dtype_and_direction_are_refused() -> None:
    plan = build_schedule("balanced", size=2, seq_length=8)
    with pytest.raises(ScheduleError, match="dtype=int7"):
        plan.bytes_sent(0, dtype="int7")
    with pytest.raises(ScheduleError, match="use 'forward' or 'backward'"):
        plan.bytes_sent(0, "sideways")


def _random_problem(pick: random.Random) -> dict:
    # small sizes are as telling and far cheaper, so most draws are small
    size = pick.randint(1, 64) if pick.random() < 0.02 else pick.randint(1, 9)
    if pick.random() < 0.5:
        lengths = even_lengths(pick.randint(size, size * 40), size)
    else:
        lengths = tuple(pick.randint(1, 30) for _ in range(size))
    kv_heads = pick.randint(1, 8)
    return {
        "name": pick.choice(["balanced", "ring", "zigzag", "allgather", "ulysses"]),
        "size": size,
        "lengths": lengths,
        "mask": pick.choice([Causal(), Full()]),
        "kv_heads": kv_heads,
        "query_heads": kv_heads * pick.randint(1, 8),
        "head_dim": pick.choice([8, 64, 128]),
    }


@pytest.mark.parametrize(
    ("seed", "count"), [(2310, 400), pytest.param(3294, 2_000, marks=pytest.mark.slow)]
)
def test_random_schedules_are_proved(seed: int, count: int) -> None:
    pick = random.Random(seed)
    for _ in range(count):
        problem = _random_problem(pick)
        try:
            _prove(build_schedule(**problem))
        except Exception as failure:
            raise AssertionError(f"{problem}") from failure
