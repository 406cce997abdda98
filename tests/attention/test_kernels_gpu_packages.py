# SPDX-License-Identifier: Apache-2.0
"""GPU backends without a GPU: stand-ins with the packages' exact signatures, and meta tensors."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_seqpar.attention.kernels import (
    Kernel,
    TileCall,
    aten_flash,
    cudnn,
    flash_attn2,
    flash_attn3,
    flash_attn4,
    installed,
    registry,
)
from megatron_seqpar.attention.kernels.bands import CutBands, not_tall
from megatron_seqpar.attention.kernels.base import Bands
from tests.attention.stand_ins import aten, flash2, flash3, flash4
from tests.support.tiles import run, tile_inputs, truth
from tests.support.truth import Attention, Inputs, attention, inputs

BACKENDS = ("flash2", "flash3", "flash4", "aten", "cudnn-3", "cudnn-4")


@pytest.fixture(scope="session")
def flash3_operators() -> Iterator[None]:
    library = flash3.register("flash_attn_3")
    yield
    library._destroy()


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch, flash3_operators: None) -> dict[str, str]:
    """All packages installed as stand-ins; returns their versions, which a test may change."""
    for name in ("flash_attn", "flash_attn.cute", "flash_attn_3", "flash_attn_3._C"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", flash2)
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", flash4)
    versions = {"flash-attn": "2.8.3.post2", "flash_attn_3": "3.0.0b1", "flash-attn-4": "4.0.0b36"}

    def version(distribution: str) -> str:
        if distribution not in versions:
            raise installed.PackageNotFoundError(distribution)
        return versions[distribution]

    monkeypatch.setattr(installed, "version", version)
    for module in (aten_flash, cudnn, flash_attn2, flash_attn3, flash_attn4):
        monkeypatch.setattr(module, "no_gpu", lambda: None)
    return versions


def stand_in_operators(monkeypatch: pytest.MonkeyPatch, module: Any, fake: Any) -> None:
    monkeypatch.setattr(module, "_forward", SimpleNamespace(default=fake.forward))
    monkeypatch.setattr(module, "_backward", SimpleNamespace(default=fake.backward))


@pytest.fixture(params=BACKENDS)
def kernel(
    request: pytest.FixtureRequest, packages: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> Kernel:
    """Every GPU backend, over stand-ins."""
    if request.param == "aten":
        stand_in_operators(monkeypatch, aten_flash, aten.Flash())
        return aten_flash.AtenFlashAttention()
    if request.param.startswith("cudnn"):
        stand_in_operators(monkeypatch, cudnn, aten.Cudnn(int(request.param[-1])))
        return cudnn.CudnnAttention()
    return {
        "flash2": flash_attn2.FlashAttention2,
        "flash3": flash_attn3.FlashAttention3,
        "flash4": flash_attn4.FlashAttention4,
    }[request.param]()


@pytest.fixture
def bands(kernel: Kernel) -> Bands:
    """What the table says of the bands that `kernel` serves."""
    (record,) = [r for r in registry.KERNELS if r.attribute == type(kernel).__name__]
    return record.bands


def assert_true(got: Attention, exact: Attention) -> None:
    for ours, right in zip(got, exact, strict=True):
        torch.testing.assert_close(ours.double(), right, rtol=0, atol=1e-4)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("h", "hkv"), [(4, 4), (6, 2)])
def test_every_argument_arrives(kernel: Kernel, h: int, hkv: int, causal: bool) -> None:
    data = inputs(2, 24, h, hkv, 16, torch.float32)
    got = run(kernel, data, TileCall(0.3, high=0 if causal else None))
    assert_true(got, attention(data, causal=causal, scale=0.3))


def test_slices_of_sequence_first_chunks(kernel: Kernel) -> None:
    """The LSE of a slice of queries is not dense; what the kernels read must be."""
    whole = inputs(2, 40, 4, 2, 16, torch.float32)
    strided = Inputs(*(t.transpose(0, 1).contiguous().transpose(0, 1) for t in whole))
    part = slice(8, 32)
    data = Inputs(strided.q[:, part], *(t[:, :20] for t in strided[1:3]), strided.dout[:, part])
    call = TileCall(0.25)
    out, lse = kernel.forward(*strided[:3], call)
    got = kernel.backward(data.dout, data.q, data.k, data.v, out[:, part], lse[:, :, part], call)
    exact = registry._load(registry._BY_NAME["reference"], 16, 16).backward(
        data.dout, data.q, data.k, data.v, out[:, part], lse[:, :, part], call
    )
    for ours, right in zip(got, exact, strict=True):
        torch.testing.assert_close(ours, right, rtol=0, atol=1e-5)


def test_one_key(kernel: Kernel) -> None:
    q, k, v, dout = inputs(1, 1, 4, 2, 16, torch.float32)
    exact = attention(Inputs(q, k, v, dout), causal=True)
    assert_true(run(kernel, Inputs(q, k, v, dout), TileCall(0.25, high=0)), exact)


# (queries, keys, low, high): causal with an offset, inverse, windows, tall and wide tiles
BANDS = [
    (24, 24, -5, 0),
    (24, 24, -22, 0),
    (24, 24, 0, None),
    (24, 24, -3, 4),
    (16, 24, None, 8),
    (16, 24, None, 13),
    (24, 16, -8, 0),
    (24, 8, None, 3),
    (24, 8, -19, None),
    (24, 8, -20, 4),
    (24, 9, -17, 2),
    (30, 5, -25, 0),
    (8, 30, -1, 23),
    (1, 7, None, None),
    (7, 1, None, None),
]


@pytest.mark.parametrize("band", BANDS)
def test_every_band(kernel: Kernel, bands: Bands, band: tuple[int, int, Any, Any]) -> None:
    """Windows arrive as the package counts them; what it misreads never reaches it."""
    sq, skv, low, high = band
    data = tile_inputs(2, sq, skv, (4, 2), 16, torch.float32)
    call = TileCall(0.3, low, high)
    whole = kernel if bands is Bands.ALL else CutBands(kernel, bands)
    assert_true(run(whole, data, call), truth(data, call))


@pytest.mark.parametrize("band", [b for b in BANDS if b[:2] == (24, 24)])
def test_windows_go_straight_to_kernels_that_take_them(
    kernel: Kernel, bands: Bands, band: tuple[int, int, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[TileCall] = []
    forward = kernel.forward

    def spy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: TileCall) -> Any:
        calls.append(call)
        return forward(q, k, v, call)

    monkeypatch.setattr(kernel, "forward", spy)
    sq, skv, low, high = band
    data = tile_inputs(1, sq, skv, (2, 2), 16, torch.float32)
    whole = kernel if bands is Bands.ALL else CutBands(kernel, bands)
    call = TileCall(0.3, low, high)
    whole.forward(*data[:3], call)
    assert (calls == [call]) is (bands is not Bands.NONE)


@pytest.mark.parametrize("tall", [(24, 8, None, 3), (24, 8, -19, None), (24, 8, -20, 4)])
def test_flash2_misreads_tall_bands(
    packages: dict[str, str], tall: tuple[int, int, Any, Any]
) -> None:
    """Why they are cut: given to it as they are, they come out wrong."""
    sq, skv, low, high = tall
    call = TileCall(0.3, low, high)
    assert not_tall(sq, skv, call) is False
    data = tile_inputs(1, sq, skv, (2, 2), 16, torch.float32)
    out, _ = flash_attn2.FlashAttention2().forward(*data[:3], call)
    difference = (out.double() - truth(data, call).out).abs()
    assert not difference.max() < 1e-2  # wrong, or not a number


def test_softcap_is_passed_on(packages: dict[str, str]) -> None:
    data = tile_inputs(1, 24, 24, (4, 2), 16, torch.float32)
    call = TileCall(2.0, -7, 0, softcap=3.0)
    exact = truth(data, call)
    classes = (
        flash_attn2.FlashAttention2, flash_attn3.FlashAttention3, flash_attn4.FlashAttention4
    )  # fmt: skip
    for kernel_class in classes:
        assert_true(run(kernel_class(), data, call), exact)
    without = truth(data, call._replace(softcap=0.0))
    assert (without.dq - exact.dq).abs().max() > 0.1


@pytest.mark.parametrize("deterministic", [True, False])
def test_deterministic_is_passed_on(
    packages: dict[str, str], monkeypatch: pytest.MonkeyPatch, deterministic: bool
) -> None:
    fake = aten.Flash()
    stand_in_operators(monkeypatch, aten_flash, fake)
    data = inputs(1, 8, 2, 2, 16, torch.float32)
    pairs: list[tuple[Any, Any]] = [
        (flash_attn2.FlashAttention2(), flash2),
        (flash_attn3.FlashAttention3(), flash3),
        (flash_attn4.FlashAttention4(), flash4),
        (aten_flash.AtenFlashAttention(), fake),
    ]
    for kernel, stand_in in pairs:
        stand_in.deterministic_calls.clear()
        run(kernel, data, TileCall(0.25, high=0, deterministic=deterministic))
        assert stand_in.deterministic_calls == [deterministic], stand_in
    assert not torch.are_deterministic_algorithms_enabled()


def test_available_when_installed(packages: dict[str, str]) -> None:
    for module in (flash_attn2, flash_attn3, flash_attn4):
        assert module.unavailable() is None


@pytest.mark.parametrize(
    ("module", "distribution", "version", "says"),
    [
        (flash_attn2, "flash-attn", "2.6.3", "flash-attn 2.6.3 is outside 2.7 <= version < 2.9"),
        (flash_attn2, "flash-attn", "2.9.0", "flash-attn 2.9.0 is outside"),
        (flash_attn2, "flash-attn", None, "flash-attn is not installed"),
        (flash_attn3, "flash_attn_3", "4.0", "flash_attn_3 4.0 is outside"),
        (flash_attn3, "flash_attn_3", None, "flash_attn_3 is not installed"),
        (flash_attn4, "flash-attn-4", "4.0.0b8", "flash-attn-4 4.0.0b8 is outside 4.0.0b9"),
        (flash_attn4, "flash-attn-4", None, "flash-attn-4 is not installed"),
        (flash_attn4, "flash-attn-4", "unreadable", "unreadable version"),
    ],
)
def test_versions(
    packages: dict[str, str], module: Any, distribution: str, version: str | None, says: str
) -> None:
    del packages[distribution]
    if version is not None:
        packages[distribution] = version
    assert says in module.unavailable()


def test_another_signature_is_found_out(
    packages: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def older(q: object, k: object, v: object, dropout_p: float, window_size: object) -> None:
        """The parameters of 2.6."""

    changed = SimpleNamespace(
        _flash_attn_forward=older, _flash_attn_backward=flash2._flash_attn_backward
    )
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", changed)
    assert "takes no parameter softmax_scale, causal, window_size_left" in str(
        flash_attn2.unavailable()
    )


def test_flash3_builds_whose_backward_also_returns_gradients() -> None:
    library = flash3.register("flash_attn_3_of_2025", flash3.OLDER_BACKWARD)
    operator = torch.ops.flash_attn_3_of_2025.bwd.default
    assert installed.schema_differs(operator, flash_attn3._BACKWARD) is None
    assert "takes no parameter sinks" in str(installed.schema_differs(operator, ("dq", "sinks")))
    assert "returns 8 values, not 4" in str(installed.schema_differs(operator, (), 4))
    library._destroy()


def test_broken_installation(packages: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn_3._C", None)
    assert "importing flash_attn_3._C fails" in str(flash_attn3.unavailable())


def test_wrong_gpu(packages: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    reason = registry.unavailable(registry._BY_NAME["flash3"])
    assert reason == "serves GPUs of compute capability 9.x, not 8.0"
    assert registry.unavailable(registry._BY_NAME["flash2"]) is None


def test_auto_prefers_by_gpu(packages: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {}
    for capability in ((8, 0), (9, 0), (10, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, c=capability: c)
        registry._select.cache_clear()
        chosen[capability[0]], _ = registry.select(
            "auto", device=torch.device("cuda"), dtype=torch.bfloat16, head_dim=128
        )
    registry._select.cache_clear()
    assert chosen == {8: "flash2", 9: "flash3", 10: "flash4", 12: "flash2"}


@pytest.mark.parametrize("module", [aten_flash, cudnn])
def test_schemas_of_the_installed_torch(module: Any) -> None:
    forward, backward = module._forward.default, module._backward.default
    assert installed.schema_differs(forward, module._FORWARD, module._FORWARD_RESULTS) is None
    assert installed.schema_differs(backward, module._BACKWARD, module._GRADIENTS) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "kernel_class", [aten_flash.AtenFlashAttention, cudnn.CudnnAttention], ids=["aten", "cudnn"]
)
@pytest.mark.parametrize("call", [TileCall(0.125), TileCall(0.125, -40, 3)], ids=["full", "band"])
def test_real_operators_on_meta_tensors(
    kernel_class: Any, dtype: torch.dtype, call: TileCall
) -> None:
    """The operators themselves take our arguments; shapes and dtypes come back as promised."""
    kernel = kernel_class()

    def empty(tokens: int, heads: int) -> torch.Tensor:
        return torch.empty(2, tokens, heads, 64, dtype=dtype, device="meta")

    q, k, v = empty(96, 8)[:, 16:80], empty(48, 2), empty(48, 2)
    out, lse = kernel.forward(q, k, v, call)
    assert (out.shape, out.dtype) == (q.shape, dtype)
    assert (tuple(lse.shape), lse.dtype) == ((2, 8, 64), torch.float32)
    grads = kernel.backward(empty(64, 8), q, k, v, out, lse, call)
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]
    assert {g.dtype for g in grads} == {dtype}
