# SPDX-License-Identifier: Apache-2.0
"""Bands of diagonals and soft-caps on the kernels that run here; and how bands are cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_seqpar.attention.kernels import Kernel, TileCall, reference, registry, select
from megatron_seqpar.attention.kernels.bands import CutBands, not_tall, plain
from megatron_seqpar.attention.kernels.base import Bands
from megatron_seqpar.attention.kernels.pieces import Piece, pieces
from megatron_seqpar.attention.kernels.reference import ReferenceAttention
from tests.support import tiles
from tests.support.tiles import assert_close_as, run, tile_inputs, truth, visible
from tests.support.truth import Attention, Inputs, largest_difference

Band = tuple[int, int, int | None, int | None]

# (queries, keys, low, high)
SHAPES: dict[str, Band] = {
    "full": (13, 9, None, None),
    "causal square": (17, 17, None, 0),
    "inverse square": (17, 17, 0, None),
    "causal, to the right": (12, 20, None, 8),
    "causal, partly full": (12, 20, None, 13),
    "causal, tall": (20, 12, None, 5),
    "inverse, wide": (12, 20, -3, None),
    "window": (40, 40, -7, 0),
    "window on both sides": (40, 40, -4, 6),
    "window of two": (40, 40, -1, 0),
    "window of one": (40, 40, 0, 0),
    "window off the diagonal": (21, 33, -2, 15),
    "window wider than the keys": (40, 12, -33, 7),
    "window as wide as the keys": (30, 12, -18, 0),
    "one row": (1, 20, None, None),
    "one column": (20, 1, None, None),
    "one pair": (1, 1, None, 0),
}


def here(name: str, dtype: torch.dtype = torch.float64, dim: int = 16, **options: Any) -> Kernel:
    return select(name, device=torch.device("cpu"), dtype=dtype, head_dim=dim, **options)[1]


@st.composite
def bands(draw: st.DrawFn, most: int = 48) -> Band:
    """Any tile whose every row and column has a pair."""
    sq, skv = draw(st.integers(1, most)), draw(st.integers(1, most))
    low = draw(st.none() | st.integers(1 - sq, min(0, skv - sq)))
    high = draw(st.none() | st.integers(max(0, skv - sq), skv - 1))
    return sq, skv, low, high


def assert_exact(got: Attention, exact: Attention) -> None:
    differences = largest_difference(got, exact)
    assert max(differences.values()) < 1e-8, differences


# ---- numbers --------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_exact_in_fp64(name: str, shape: str, heads: tuple[int, int]) -> None:
    sq, skv, low, high = SHAPES[shape]
    data = tile_inputs(2, sq, skv, heads, 16, seed=sq)
    call = TileCall(0.3, low, high)
    assert_exact(run(here(name), data, call), truth(data, call))


@pytest.mark.parametrize("name", ["cpu", "reference"])
@settings(deadline=None, max_examples=150)
@given(band=bands())
def test_any_band(name: str, band: Band) -> None:
    sq, skv, low, high = band
    data = tile_inputs(2, sq, skv, (4, 2), 8, seed=sq)
    call = TileCall(0.4, low, high)
    assert_exact(run(here(name, dim=8), data, call), truth(data, call))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (6, 1)], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("band", [(192, 192, -50, 0), (150, 200, None, 80), (192, 192, -3, 2)])
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_low_precision_error_ratio(
    name: str, band: Band, heads: tuple[int, int], dtype: torch.dtype
) -> None:
    sq, skv, low, high = band
    data = tile_inputs(2, sq, skv, heads, 32, dtype)
    call = TileCall(32**-0.5, low, high)
    got = run(here(name, dtype, 32), data, call)
    assert (got.out.dtype, got.lse.dtype, got.dk.dtype) == (dtype, torch.float32, dtype)
    assert_close_as(got, tiles.plain(data, call), truth(data, call))


@pytest.mark.parametrize(("dim", "value_dim"), [(192, 128), (128, 192), (256, 256)])
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_wide_heads(name: str, dim: int, value_dim: int) -> None:
    data = tile_inputs(1, 20, 24, (4, 2), dim, dv=value_dim)
    call = TileCall(dim**-0.5, -3, 9)
    assert_exact(run(here(name, dim=dim, value_dim=value_dim), data, call), truth(data, call))


@pytest.mark.parametrize("shape", ["window", "causal, partly full", "window wider than the keys"])
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_strided_inputs(name: str, shape: str) -> None:
    """Parts of longer chunks, of fewer heads, and with the sequence first in memory."""
    sq, skv, low, high = SHAPES[shape]
    whole = tile_inputs(3, sq + 9, skv + 9, (8, 4), 16)
    whole = Inputs(*(t.transpose(0, 1).contiguous().transpose(0, 1) for t in whole))
    rows, cols = slice(5, 5 + sq), slice(3, 3 + skv)
    strided = Inputs(
        whole.q[:, rows, 2:6], whole.k[:, cols, 1:3], whole.v[:, cols, 1:3],
        whole.dout[:, rows, 2:6],
    )  # fmt: skip
    call = TileCall(0.3, low, high)
    assert_exact(run(here(name), strided, call), truth(strided, call))


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_a_band_of_a_longer_row(name: str) -> None:
    """Backward is given the output and LSE over all keys; tiles' gradients add up to the whole."""
    data = tile_inputs(2, 30, 50, (4, 2), 16)
    whole = TileCall(0.3, -6, 30)
    exact = truth(data, whole)
    kernel, parts = here(name), []
    for cols in (slice(0, 24), slice(24, 50)):
        low, high = -6 - cols.start, 30 - cols.start
        first = max(0, -high)
        rows = slice(first, min(30, cols.stop - cols.start - low))
        call = TileCall(0.3, low + first, high + first)
        grads = kernel.backward(
            data.dout[:, rows], data.q[:, rows], data.k[:, cols], data.v[:, cols],
            exact.out[:, rows], exact.lse[:, :, rows], call,
        )  # fmt: skip
        dq = torch.zeros_like(data.q)
        dq[:, rows] = grads[0]
        parts.append((dq, *grads[1:]))
    dqs, dks, dvs = zip(*parts, strict=True)
    got = sum(dqs), torch.cat(dks, 1), torch.cat(dvs, 1)
    for ours, right in zip(got, exact[2:], strict=True):
        torch.testing.assert_close(ours, right, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_deterministic_gradients_repeat_bitwise(name: str) -> None:
    data = tile_inputs(2, 96, 96, (8, 2), 32, torch.bfloat16)
    call = TileCall(0.2, -20, 3, deterministic=True)
    kernel = here(name, torch.bfloat16, 32, deterministic=True)
    first, second = (run(kernel, data, call) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ---- soft-cap -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["full", "causal square", "window", "causal, partly full"])
@pytest.mark.parametrize("softcap", [0.5, 5.0, 50.0])
def test_softcap_in_fp64(softcap: float, shape: str) -> None:
    sq, skv, low, high = SHAPES[shape]
    data = tile_inputs(2, sq, skv, (4, 2), 16)
    call = TileCall(2.0, low, high, softcap)
    assert_exact(run(here("reference", softcap=True), data, call), truth(data, call))


def test_softcap_of_values_of_another_dim() -> None:
    data = tile_inputs(1, 20, 20, (4, 2), 24, dv=16)
    call = TileCall(1.0, None, 0, 3.0)
    kernel = here("reference", dim=24, value_dim=16, softcap=True)
    assert_exact(run(kernel, data, call), truth(data, call))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_softcap_error_ratio(dtype: torch.dtype) -> None:
    data = tile_inputs(2, 128, 128, (8, 2), 32, dtype)
    call = TileCall(1.0, -40, 0, 5.0)
    got = run(here("auto", dtype, 32, softcap=True), data, call)
    assert_close_as(got, tiles.plain(data, call), truth(data, call))


# ---- the reference's blocks -----------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_reference_in_blocks_of_rows(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_SCORES", 0)
    monkeypatch.setattr(reference, "_ROWS", 3)
    sq, skv, low, high = SHAPES[shape]
    data = tile_inputs(2, sq, skv, (4, 2), 16)
    call = TileCall(0.8, low, high, 2.0)
    assert len(list(reference._blocks(data.q, data.k, call))) == -(-sq // 3)
    assert_exact(run(ReferenceAttention(), data, call), truth(data, call))


def test_reference_blocks_are_bounded() -> None:
    """The scores of a block, not those of the tile; and of a window, about twice its width."""
    q, k = torch.empty(1, 4096, 8, 1), torch.empty(1, 8192, 2, 1)
    for rows, _ in reference._blocks(q, k, TileCall(1.0)):
        assert (rows.stop - rows.start) * 8 * 8192 <= reference._SCORES
    blocks = list(reference._blocks(q, k, TileCall(1.0, -100, 4200)))
    assert blocks[0][0].start == 0
    assert blocks[-1][0].stop == 4096
    narrow = list(reference._blocks(k, k, TileCall(1.0, -255, 0)))
    scores = sum((r.stop - r.start) * (c.stop - c.start) for r, c in narrow)
    assert scores < 2.1 * 256 * 8192


# ---- pieces ---------------------------------------------------------------------------------


def covered(sq: int, skv: int, found: list[Piece]) -> torch.Tensor:
    """How often each pair of `[sq, skv]` lies in a piece."""
    count = torch.zeros(sq, skv, dtype=torch.int64)
    for piece in found:
        assert piece.blocks == 1 or piece.rows == piece.cols
        assert plain(piece.rows, piece.cols, TileCall(1.0, piece.low, piece.high)) or (
            (piece.low, piece.high) == (0, None) and piece.rows == piece.cols
        )
        inside = visible(piece.rows, piece.cols, TileCall(1.0, piece.low, piece.high))
        for block in range(piece.blocks):
            q, kv = piece.q + block * piece.rows, piece.kv + block * piece.cols
            assert q + piece.rows <= sq
            assert kv + piece.cols <= skv
            count[q : q + piece.rows, kv : kv + piece.cols] += inside
    return count


def test_pieces_hold_every_pair_once() -> None:
    tried = 0
    for sq in range(1, 9):
        for skv in range(1, 9):
            for low in (None, *range(-sq, min(0, skv - sq) + 1)):
                for high in (None, *range(max(0, skv - sq), skv + 1)):
                    found = pieces(sq, skv, low, high)
                    expected = visible(sq, skv, TileCall(1.0, low, high)).long()
                    assert torch.equal(covered(sq, skv, found), expected), (sq, skv, low, high)
                    assert len(found) <= 9
                    tried += 1
    assert tried > 1500


@settings(max_examples=200, deadline=None)
@given(bands(most=150))
def test_pieces_of_longer_tiles(band: Band) -> None:
    sq, skv, low, high = band
    found = pieces(*band)
    assert torch.equal(covered(sq, skv, found), visible(sq, skv, TileCall(1.0, low, high)).long())
    assert len(found) <= (3 if low is None or high is None else 9)


@pytest.mark.parametrize(
    ("band", "calls"),
    [
        ((100, 100, None, None), 1),
        ((100, 100, None, 0), 1),
        ((100, 100, 0, None), 1),
        ((50, 100, None, 50), 2),
        ((50, 100, None, 70), 3),
        ((4096, 4096, -127, 0), 6),
        ((4096, 4096, -127, 9), 9),
        ((4096, 4096, -1, 0), 3),
        ((4096, 4096, 0, 0), 1),
    ],
)
def test_number_of_pieces(band: Band, calls: int) -> None:
    assert len(pieces(*band)) == calls


@pytest.mark.parametrize(
    "band", [(4, 4, 1, None), (4, 4, None, -1), (4, 8, None, 3), (8, 4, -3, 0)]
)
def test_bands_with_rows_or_columns_of_no_pair_are_refused(band: Band) -> None:
    with pytest.raises(ValueError, match="with no pair"):
        pieces(*band)


def test_what_is_served_is_not_cut() -> None:
    calls: list[TileCall] = []

    class Counting(ReferenceAttention):
        def forward(self, q: Any, k: Any, v: Any, call: TileCall) -> Any:
            calls.append(call)
            return super().forward(q, k, v, call)

    data = tile_inputs(1, 24, 24, (2, 2), 16)
    for served, band, number in (
        (Bands.NONE, (None, 0), 1),
        (Bands.NONE, (None, None), 1),
        (Bands.NONE, (0, None), 1),
        (Bands.NONE, (-3, 0), 3),
        (Bands.NONE, (-4, 1), 8),
        (Bands.NOT_TALL, (-3, 0), 1),
    ):
        calls.clear()
        CutBands(Counting(), served).forward(*data[:3], TileCall(0.3, *band))
        assert len(calls) == number
        assert served is Bands.NOT_TALL or all(call.low is None for call in calls)


def test_tall_bands() -> None:
    """Cut only where a window reaches as far as there are keys, or one side has no limit."""
    assert not_tall(24, 24, TileCall(1.0, -3, 0))
    assert not_tall(24, 23, TileCall(1.0, -3, None))
    assert not_tall(24, 8, TileCall(1.0, None, None))
    assert not_tall(24, 20, TileCall(1.0, -5, 0))
    assert not not_tall(24, 8, TileCall(1.0, -17, None))
    assert not not_tall(24, 8, TileCall(1.0, None, 3))


@pytest.mark.parametrize("width", [1, 2, 3, 16, 100, 1000])
def test_windows_cost_their_pairs_and_few_calls(width: int) -> None:
    """However narrow: the blocks along a window go to the kernel as one batch."""
    computed: list[int] = []

    class Counting(ReferenceAttention):
        def forward(self, q: Any, k: Any, v: Any, call: TileCall) -> Any:
            seen = visible(q.shape[1], k.shape[1], call)
            computed.append(q.shape[0] * int(seen.sum()))
            return super().forward(q, k, v, call)

    data, call = tile_inputs(1, 4096, 4096, (1, 1), 4), TileCall(0.5, 1 - width, 0)
    CutBands(Counting(), Bands.NONE).forward(*data[:3], call)
    assert len(computed) <= 6
    assert sum(computed) == int(visible(4096, 4096, call).sum())


def test_the_table_names_kernels_that_take_bands() -> None:
    table = {record.name: record.bands for record in registry.KERNELS}
    assert [n for n, b in table.items() if b is Bands.ALL] == ["flash3", "flash4", "reference"]
    assert [n for n, b in table.items() if b is Bands.NONE] == ["cudnn", "cpu"]
