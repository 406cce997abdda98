# SPDX-License-Identifier: Apache-2.0
"""Kernels that run here, against autograd's truth; and the choice among kernels."""

from __future__ import annotations

import logging
from functools import partial

import pytest
import torch

from megatron_seqpar.attention import Causal, ThreadTransport, dist_flash_attention, kernels
from megatron_seqpar.attention.kernels import Kernel, TileCall, registry
from megatron_seqpar.attention.kernels.base import Wanted
from megatron_seqpar.attention.kernels.cpu import CpuFlashAttention
from megatron_seqpar.attention.kernels.reference import ReferenceAttention
from megatron_seqpar.errors import KernelError
from tests.support.tiles import assert_close_as, plain, run, truth
from tests.support.truth import Inputs, attention, inputs, largest_difference

HEADS = [(4, 4), (8, 2), (6, 1)]
HERE: dict[str, Kernel] = {"cpu": CpuFlashAttention(), "reference": ReferenceAttention()}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("h", "hkv"), HEADS)
@pytest.mark.parametrize("name", HERE)
def test_exact_in_fp64(name: str, h: int, hkv: int, causal: bool) -> None:
    data = inputs(3, 37, h, hkv, 16, seed=h)
    got = run(HERE[name], data, TileCall(0.31, high=0 if causal else None, deterministic=True))
    differences = largest_difference(got, attention(data, causal=causal, scale=0.31))
    assert max(differences.values()) < 1e-10, differences
    assert got.lse.dtype == torch.float64


@pytest.mark.parametrize("dim", [16, 64, 96, 128, 256])
@pytest.mark.parametrize("name", HERE)
def test_head_dims(name: str, dim: int) -> None:
    data = inputs(1, 40, 4, 2, dim)
    got = run(HERE[name], data, TileCall(dim**-0.5, high=0))
    assert max(largest_difference(got, attention(data, causal=True)).values()) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("h", "hkv"), [*HEADS, (16, 2)])
@pytest.mark.parametrize("name", HERE)
def test_low_precision_error_ratio(name: str, h: int, hkv: int, dtype: torch.dtype) -> None:
    data = inputs(2, 192, h, hkv, 64, dtype)
    call = TileCall(64**-0.5, high=0)
    got = run(HERE[name], data, call)
    assert (got.out.dtype, got.lse.dtype, got.dk.dtype) == (dtype, torch.float32, dtype)
    assert_close_as(got, plain(data, call), truth(data, call))


def test_cpu_adds_up_a_group_in_fp32() -> None:
    """In bf16 the operator itself loses as the group of query heads grows; the kernel must not."""
    data = inputs(1, 128, 16, 1, 32, torch.bfloat16)
    truth = attention(data, causal=True)
    got = run(CpuFlashAttention(), data, TileCall(32**-0.5, high=0))
    # one rounding of the sum to bf16 (2**-9 of the value, at most) and the error of sixteen parts
    parts = Inputs(data.q, *(t.expand(-1, -1, 16, -1).contiguous() for t in data[1:3]), data.dout)
    alone = run(CpuFlashAttention(), parts, TileCall(32**-0.5, high=0))
    summed = alone.dk.double().sum(2, keepdim=True)
    error = (got.dk.double() - truth.dk).square().mean().sqrt()
    allowed = (summed - truth.dk).square().mean().sqrt() + truth.dk.square().mean().sqrt() * 2**-9
    assert error <= allowed


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", HERE)
def test_strided_inputs(name: str, dtype: torch.dtype) -> None:
    """Slices of longer chunks and sequence-first memory, as the executor passes them."""
    data = inputs(2, 96, 8, 2, 32, dtype)
    sequence_first = Inputs(*(t.transpose(0, 1).contiguous().transpose(0, 1) for t in data))
    at = slice(17, 65)
    sliced = Inputs(*(t[:, at] for t in sequence_first))
    dense = Inputs(*(t[:, at].contiguous() for t in data))
    call = TileCall(0.2)
    _, whole_lse = HERE[name].forward(*sequence_first[:3], call)
    out, _ = HERE[name].forward(*dense[:3], call)
    lse = whole_lse[:, :, at]
    got = HERE[name].backward(sliced.dout, *sliced[:3], out, lse, call)
    expected = HERE[name].backward(dense.dout, *dense[:3], out, lse.contiguous(), call)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(HERE[name].forward(*sliced[:3], call)[0], out)


@pytest.mark.parametrize(("dim", "value_dim"), [(24, 16), (16, 40), (192, 128)])
def test_values_of_another_dim_are_padded(dim: int, value_dim: int) -> None:
    """Multi-head latent attention: the CPU kernel wants equal dims, the reference does not."""
    q, k = (torch.randn(2, 12, heads, dim, dtype=torch.float64) for heads in (4, 2))
    v, dout = (torch.randn(2, 12, heads, value_dim, dtype=torch.float64) for heads in (2, 4))
    call = TileCall(0.4, high=0)
    results = []
    for name in ("cpu", "reference"):
        chosen, kernel = kernels.select(
            name, device=q.device, dtype=q.dtype, head_dim=dim, value_dim=value_dim
        )
        assert chosen == name
        out, lse = kernel.forward(q, k, v, call)
        assert out.shape == dout.shape
        results.append((out, lse, *kernel.backward(dout, q, k, v, out, lse, call)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_values_of_another_dim_over_ranks() -> None:
    q, k = (torch.randn(1, 10, heads, 24, dtype=torch.float64) for heads in (4, 2))
    v = torch.randn(1, 10, 2, 16, dtype=torch.float64)
    whole, _ = ReferenceAttention().forward(q, k, v, TileCall(24**-0.5, high=0))

    def work(transport: ThreadTransport) -> torch.Tensor:
        at = slice(5 * transport.rank, 5 * transport.rank + 5)
        out = dist_flash_attention(q[:, at], k[:, at], v[:, at], group=transport, mask=Causal())
        assert isinstance(out, torch.Tensor)
        return out

    torch.testing.assert_close(torch.cat(ThreadTransport.run(2, work), 1), whole)


# ---- the choice -----------------------------------------------------------------------------


def select(name: str, dtype: torch.dtype = torch.float32, head_dim: int = 64, **options: object):
    return kernels.select(
        name,
        device=torch.device("cpu"),
        dtype=dtype,
        head_dim=head_dim,
        **options,  # type: ignore[arg-type]
    )


def test_auto_on_cpu_takes_the_cpu_kernel_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    registry._select.cache_clear()
    with caplog.at_level(logging.INFO, logger=registry.logger.name):
        assert select("auto")[0] == "cpu"
    assert "attention kernel for cpu float32: cpu" in caplog.text
    assert all(record.levelno < logging.WARNING for record in caplog.records)


def test_auto_falls_back_and_says_to_what_and_why(caplog: pytest.LogCaptureFixture) -> None:
    registry._select.cache_clear()
    with caplog.at_level(logging.INFO, logger=registry.logger.name):
        assert select("auto", head_dim=2048)[0] == "reference"
    assert "reference" in caplog.text
    assert "cpu serves head dims to 1024, not 2048" in caplog.text
    assert caplog.records[-1].levelno == logging.WARNING


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("flash2", "serves cuda tensors, not cpu; use one of auto, cpu, reference"),
        ("cudnn", "serves cuda tensors, not cpu; use one of auto, cpu, reference"),
        ("flash9", "kernel='flash9' is unknown; use one of auto, flash3"),
    ],
)
def test_explicit_choice_fails_loudly_with_the_alternatives(name: str, says: str) -> None:
    with pytest.raises(KernelError) as failure:
        select(name)
    assert says in str(failure.value)
    assert f"kernel={name!r}" in str(failure.value)


def test_explicit_choice_of_a_size_it_does_not_serve() -> None:
    with pytest.raises(KernelError, match=r"'cpu': serves head dims to 1024.* use one of auto"):
        select("cpu", head_dim=2048)


def test_softcap_is_passed_over_and_refused_by_name() -> None:
    assert select("auto", softcap=True)[0] == "reference"
    with pytest.raises(KernelError, match=r"'cpu': has no logit soft-cap; use one of auto, ref"):
        select("cpu", softcap=True)


def test_nothing_serves_it() -> None:
    with pytest.raises(KernelError, match="no attention kernel serves this call; flash3 serves"):
        select("auto", dtype=torch.int8)


def test_report_names_every_backend() -> None:
    lines = dict(kernels.report())
    assert ("auto", *lines) == kernels.names()
    assert lines["cpu"] == lines["reference"] == "available"


def test_head_dims_of_the_table() -> None:
    table = {record.name: record for record in registry.KERNELS}
    flash3 = table["flash3"]
    assert flash3.padded_dim(192, 128) is None
    assert flash3.padded_dim(128, 128) is None
    assert flash3.padded_dim(100, 100) == 104
    assert table["flash2"].padded_dim(192, 128) == 192
    assert table["reference"].padded_dim(24, 3) is None
    half = partial(Wanted, "cuda", "bfloat16")
    assert table["flash4"].refuses(half(192, 128)) is None
    assert "head dims to 128" in str(table["flash4"].refuses(half(192, 192)))
    assert "deterministic for head dims to 192" in str(flash3.refuses(half(256, 256, True)))
    assert "no deterministic backward" in str(table["cudnn"].refuses(half(64, 64, True)))
    assert "bfloat16, float16, not float32" in str(
        table["aten"].refuses(Wanted("cuda", "float32", 64, 64))
    )


def test_softcap_of_the_table() -> None:
    wanted = Wanted("cuda", "bfloat16", 64, 64, softcap=True)
    serves = [record.name for record in registry.KERNELS if record.refuses(wanted) is None]
    assert serves == ["flash3", "flash4", "flash2", "reference"]
