# SPDX-License-Identifier: Apache-2.0
"""Every GPU backend that is installed, against fp64 truth, on a real GPU."""

from __future__ import annotations

import pytest
import torch

from megatron_seqpar.attention import ThreadTransport, dist_flash_attention
from megatron_seqpar.attention.kernels import KERNELS, TileCall, registry, select
from megatron_seqpar.attention.kernels.base import Wanted
from tests.support.tiles import assert_close_as, plain, run, tile_inputs, truth
from tests.support.truth import Attention, Inputs, inputs

pytestmark = pytest.mark.needs_gpu

_GPU_KERNELS = [r for r in KERNELS if "cuda" in r.devices and r.name != "reference"]
# without a GPU nothing is available, and all are listed as not run
INSTALLED = [
    record.name
    for record in _GPU_KERNELS
    if not torch.cuda.is_available() or registry.unavailable(record) is None
]


def on_gpu(b: int, s: int, h: int, hkv: int, d: int, dtype: torch.dtype) -> Inputs:
    return Inputs(*(t.cuda() for t in inputs(b, s, h, hkv, d, dtype)))


@pytest.mark.parametrize("tokens", [64, 127, 1000])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("h", "hkv"), [(4, 4), (8, 2), (6, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", INSTALLED)
def test_error_ratio(
    name: str, dtype: torch.dtype, h: int, hkv: int, causal: bool, tokens: int
) -> None:
    data = on_gpu(2, tokens, h, hkv, 64, dtype)
    _, kernel = select(name, device=data.q.device, dtype=dtype, head_dim=64)
    call = TileCall(64**-0.5, high=0 if causal else None)
    got = run(kernel, data, call)
    assert got.lse.dtype == torch.float32
    assert_close_as(got, plain(data, call), truth(data, call))


@pytest.mark.parametrize("dim", [32, 80, 128])
@pytest.mark.parametrize("name", INSTALLED)
def test_head_dims(name: str, dim: int) -> None:
    data = on_gpu(1, 300, 4, 2, dim, torch.bfloat16)
    _, kernel = select(name, device=data.q.device, dtype=torch.bfloat16, head_dim=dim)
    call = TileCall(dim**-0.5, high=0)
    assert_close_as(run(kernel, data, call), plain(data, call), truth(data, call))


@pytest.mark.parametrize(("dim", "value_dim"), [(192, 128), (256, 256)])
@pytest.mark.parametrize("name", INSTALLED)
def test_wide_heads(name: str, dim: int, value_dim: int) -> None:
    """Multi-head latent attention's heads and the widest there are, where the table lists them."""
    if registry._BY_NAME[name].refuses(Wanted("cuda", "bfloat16", dim, value_dim)):
        return
    cpu = tile_inputs(1, 300, 300, (4, 2), dim, torch.bfloat16, dv=value_dim)
    data = Inputs(*(t.cuda() for t in cpu))
    _, kernel = select(
        name, device=data.q.device, dtype=torch.bfloat16, head_dim=dim, value_dim=value_dim
    )
    call = TileCall(dim**-0.5, -100, 0)
    assert_close_as(run(kernel, data, call), plain(data, call), truth(data, call))


# (queries, keys, low, high): offsets, windows, and tall tiles, which FlashAttention 2 misreads
BANDS = [
    (300, 300, -100, 0),
    (300, 300, 0, None),
    (300, 300, -7, 9),
    (300, 300, -1, 0),
    (200, 300, None, 100),
    (200, 300, None, 177),
    (300, 200, -100, 0),
    (300, 80, None, 30),
    (300, 80, -260, None),
    (300, 80, -250, 40),
    (80, 300, -10, 230),
    (1, 300, None, None),
    (300, 1, None, None),
]


@pytest.mark.parametrize("band", BANDS)
@pytest.mark.parametrize(("h", "hkv"), [(4, 4), (8, 2)])
@pytest.mark.parametrize("name", INSTALLED)
def test_bands(name: str, h: int, hkv: int, band: tuple[int, int, int | None, int | None]) -> None:
    sq, skv, low, high = band
    cpu = tile_inputs(2, sq, skv, (h, hkv), 64, torch.bfloat16)
    data = Inputs(*(t.cuda() for t in cpu))
    _, kernel = select(name, device=data.q.device, dtype=torch.bfloat16, head_dim=64)
    call = TileCall(0.125, low, high)
    assert_close_as(run(kernel, data, call), plain(data, call), truth(data, call))


@pytest.mark.parametrize("band", [(None, None), (None, 0), (-100, 0)])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", [n for n in INSTALLED if registry._BY_NAME[n].softcap])
def test_softcap(name: str, dim: int, band: tuple[int | None, int | None]) -> None:
    """A cap low enough, and scores high enough, that most of them feel it."""
    data = on_gpu(2, 300, 4, 2, dim, torch.bfloat16)
    _, kernel = select(name, device=data.q.device, dtype=torch.bfloat16, head_dim=dim, softcap=True)
    call = TileCall(4 * dim**-0.5, *band, softcap=5.0)
    assert_close_as(run(kernel, data, call), plain(data, call), truth(data, call))


@pytest.mark.parametrize("name", INSTALLED)
def test_rectangles_and_slices(name: str) -> None:
    """A tile as the executor cuts it: part of the queries, other keys, out and LSE of the row."""
    data = on_gpu(2, 512, 8, 2, 64, torch.bfloat16)
    reference = registry._load(registry._BY_NAME["reference"], 64, 64)
    _, kernel = select(name, device=data.q.device, dtype=torch.bfloat16, head_dim=64)
    call, at = TileCall(0.125), slice(100, 301)
    out, lse = kernel.forward(*data[:3], call)
    tile = (data.dout[:, at], data.q[:, at], data.k[:, :199], data.v[:, :199])
    row = (out[:, at], lse[:, :, at])
    got = kernel.backward(*tile, *row, call)
    exact = reference.backward(*(t.double() for t in tile), row[0].double(), row[1], call)
    for ours, right in zip(got, exact, strict=True):
        error = (ours.double() - right).norm() / right.norm()
        assert error < 2e-2, error


@pytest.mark.parametrize("low", [None, -300])
@pytest.mark.parametrize(
    "name", [n for n in INSTALLED if registry._BY_NAME[n].deterministic_head_dim >= 64]
)
def test_deterministic_gradients_repeat_bitwise(name: str, low: int | None) -> None:
    data = on_gpu(2, 1024, 8, 2, 64, torch.bfloat16)
    _, kernel = select(
        name, device=data.q.device, dtype=torch.bfloat16, head_dim=64, deterministic=True
    )
    call = TileCall(0.125, low, 0, deterministic=True)
    first, second = (run(kernel, data, call) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("schedule", ["balanced", "ring"])
@pytest.mark.parametrize("name", INSTALLED)
def test_four_ranks_on_one_gpu(name: str, schedule: str) -> None:
    data = on_gpu(2, 1000, 8, 2, 64, torch.bfloat16)

    def work(transport: ThreadTransport) -> Attention:
        at = slice(250 * transport.rank, 250 * transport.rank + 250)
        q, k, v = (t[:, at].clone().requires_grad_() for t in data[:3])
        out, lse = dist_flash_attention(
            q, k, v, group=transport, schedule=schedule, kernel=name, return_lse=True
        )
        grads = torch.autograd.grad(out, (q, k, v), data.dout[:, at])
        torch.cuda.synchronize()
        return Attention(out.detach(), lse, *grads)

    parts = ThreadTransport.run(4, work)
    got = Attention(
        *(
            torch.cat(fields, dim=2 if name == "lse" else 1)
            for name, fields in zip(Attention._fields, zip(*parts, strict=True), strict=True)
        )
    )
    call = TileCall(0.125, high=0)
    assert_close_as(got, plain(data, call), truth(data, call))
