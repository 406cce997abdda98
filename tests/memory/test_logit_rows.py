# SPDX-License-Identifier: Apache-2.0
"""Kernels for rows of logits, and the choice among them."""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_seqpar.errors import KernelError
from megatron_seqpar.memory import logit_rows
from megatron_seqpar.memory.logit_rows import TorchRows, choose
from tests.memory.row_checks import DTYPES, SIZES, check, check_all, check_edges

ROOT = Path(__file__).parents[2]
HAS_TRITON = importlib.util.find_spec("triton") is not None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_torch(size, dtype):
    check(TorchRows(), size, dtype)


def test_torch_at_the_edges():
    check_edges(TorchRows())


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_triton_in_its_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "tests.memory.row_checks"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["checked", str(len(SIZES) * len(DTYPES) + 1)]


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_triton_compiles_for_gpus_that_are_not_here(capability, tmp_path, monkeypatch):
    """To machine code, which the interpreter says nothing about."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_seqpar.memory import triton_cross_entropy as ours

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    target = GPUTarget("cuda", capability, 32)
    rows = {"logits": "*bf16", "labels": "*i64", "stride": "i32", "size": "i32"}
    found = dict.fromkeys(("maximum", "total", "target"), "*fp32")
    for kernel, signature, constants in (
        (
            ours._statistics_kernel,
            {**rows, **found, "winner": "*i64"},
            {"WINNER": True, "BLOCK": 8192, "BLOCKS": 16},
        ),
        (ours._gradient_kernel, {**rows, "lse": "*fp32", "grad": "*fp32"}, {"BLOCK": 8192}),
    ):
        signature = {**signature, **dict.fromkeys(constants, "constexpr")}
        source = ASTSource(kernel, signature, constants)
        assert triton.compile(source, target=target, options={"num_warps": 16}).asm["cubin"]


@pytest.mark.needs_gpu
def test_triton_on_a_gpu():
    assert check_all(choose("triton", "cuda", torch.bfloat16), "cuda") > 1


@pytest.mark.needs_gpu
def test_triton_beyond_what_32_bits_count():
    """The last rows of more logits than a 32-bit offset reaches."""
    kernel = choose("triton", "cuda", torch.bfloat16)
    rows, size = 2**15 + 3, 2**16 + 1
    logits = torch.zeros(rows, size, dtype=torch.bfloat16, device="cuda")
    logits[-1, -1] = 3.0
    labels = torch.full((rows,), size - 1, device="cuda")
    found = kernel.statistics(logits, labels, True)
    assert found.maximum[-1] == found.target[-1] == 3.0
    assert found.winner[-1] == size - 1
    assert not found.maximum[:-1].any()
    kernel.gradient(logits, labels, torch.zeros(rows, device="cuda"), torch.ones_like(found.total))
    assert logits[-1, 0] == 1.0
    assert logits[-2, -1] == 0.0


def test_auto_takes_torch_on_a_cpu_and_says_so(caplog):
    choose.cache_clear()
    with caplog.at_level(logging.INFO, logit_rows.__name__):
        assert isinstance(choose("auto", "cpu", torch.bfloat16), TorchRows)
        choose("auto", "cpu", torch.bfloat16)
    (said,) = caplog.messages
    assert said == "loss kernel for cpu torch.bfloat16: torch (triton serves cuda tensors, not cpu)"


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_auto_takes_triton_on_a_gpu_and_torch_for_fp64_there():
    # Choosing loads the kernel's module and touches no GPU.
    assert type(choose("auto", "cuda", torch.bfloat16)).__name__ == "TritonRows"
    assert isinstance(choose("auto", "cuda", torch.float64), TorchRows)


def test_auto_takes_torch_without_triton(monkeypatch):
    monkeypatch.setattr(logit_rows.util, "find_spec", lambda name: None)
    choose.cache_clear()
    assert isinstance(choose("auto", "cuda", torch.bfloat16), TorchRows)
    with pytest.raises(KernelError, match="triton is not installed; use auto"):
        choose("triton", "cuda", torch.bfloat16)
    choose.cache_clear()


@pytest.mark.parametrize(
    ("name", "device", "dtype", "text"),
    [
        ("cuda", "cpu", torch.float32, "'cuda' is unknown; use auto, triton, torch"),
        ("triton", "cpu", torch.float32, "triton serves cuda tensors, not cpu; use auto"),
        ("triton", "cuda", torch.float64, "triton serves bfloat16, float16, float32, not float64"),
    ],
)
def test_a_named_kernel_is_used_or_refused(name, device, dtype, text):
    with pytest.raises(KernelError, match=text):
        choose(name, device, dtype)
