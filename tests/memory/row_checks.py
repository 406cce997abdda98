# SPDX-License-Identifier: Apache-2.0
"""What every kernel for rows of logits must do, against fp64.

    TRITON_INTERPRET=1 python -m tests.memory.row_checks

runs Triton's kernels on the CPU, in Triton's interpreter, and prints how many cases it checked. The
interpreter is chosen by the environment when Triton is imported, hence a process of its own.
"""

from __future__ import annotations

import itertools

import torch

from megatron_seqpar.memory.logit_rows import RowKernel

# below a block, a block, over one, several with a ragged last one
SIZES = (1, 3, 16, 17, 300, 8192, 8192 * 2 + 5)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def labels_of(rows: int, size: int) -> torch.Tensor:
    """Inside, at both ends, of other parts of the vocabulary, ignored, and far outside of int32."""
    wanted = [0, size - 1, size // 2, size, -1, -100, -size, 2**31 + 1, -(2**33)]
    return torch.tensor(list(itertools.islice(itertools.cycle(wanted), rows)))


def check(
    kernel: RowKernel, size: int, dtype: torch.dtype, device: str = "cpu", rows: int = 9
) -> None:
    """One shape and dtype: statistics, winner and gradient."""
    generator = torch.Generator().manual_seed(size)
    logits = (4 * torch.randn(rows, size, generator=generator)).to(dtype)
    logits[1] += 80  # exp would overflow in fp32 without the largest logit
    logits[2, size // 2 :] = -torch.inf
    logits[3] = logits[3, 0]  # all equal: the first wins
    labels = labels_of(rows, size)
    here = (labels >= 0) & (labels < size)
    x = logits.double()
    maximum, winner = x.max(-1).values, x.argmax(-1)
    shift = torch.where(maximum == -torch.inf, 0.0, maximum)
    target = torch.where(here, x.gather(1, torch.where(here, labels, 0)[:, None])[:, 0], 0.0)
    total = (x - shift[:, None]).exp().sum(-1)

    for asked in (False, True):
        found = kernel.statistics(logits.to(device, copy=True), labels.to(device), asked)
        close(found.maximum, maximum, 0.0)
        close(found.target, target, 0.0)
        close(found.total, total, 1e-5)
        assert found.maximum.dtype == found.total.dtype == found.target.dtype == torch.float32
        if asked:
            assert torch.equal(found.winner.cpu(), winner)
        else:
            assert found.winner is None

    lse = torch.where(total > 0, total.log(), 0.0) + shift + 0.5  # other parts add to it
    grad = torch.linspace(-1, 2, rows, dtype=torch.float64)
    grad[4] = 0.0
    onehot = torch.zeros_like(x)
    onehot[here, labels[here]] = 1.0
    expected = ((x - lse[:, None]).exp() - onehot) * grad[:, None]
    given = logits.to(device, copy=True)
    version = given._version
    got = kernel.gradient(given, labels.to(device), lse.float().to(device), grad.float().to(device))
    assert got.dtype == dtype
    assert got.data_ptr() == given.data_ptr(), "in place"
    assert given._version > version, "autograd must know"
    # rounded to the dtype once, from an fp32 that is right to an exponent's rounding
    apart = (got.cpu().double() - expected).abs()
    bound = torch.finfo(dtype).eps * expected.abs() + torch.finfo(dtype).smallest_normal + 2e-5
    assert (apart <= bound).all(), float((apart - bound).max())
    assert not got[4].any()


def close(got: torch.Tensor, expected: torch.Tensor, relative: float) -> None:
    torch.testing.assert_close(got.cpu().double(), expected, rtol=relative, atol=0.0)


def check_edges(kernel: RowKernel, device: str = "cpu") -> None:
    """No rows; a part of the vocabulary masked out whole; what is not a number."""
    empty = torch.empty(0, 8, device=device)
    none = torch.empty(0, dtype=torch.int64, device=device)
    assert kernel.statistics(empty, none, True).total.shape == (0,)
    assert kernel.gradient(empty, none, empty[:, 0], empty[:, 0]).shape == (0, 8)
    rows = torch.full((2, 40), -torch.inf, device=device)
    rows[1, 3] = torch.nan
    found = kernel.statistics(rows, torch.zeros(2, dtype=torch.int64, device=device), False)
    assert found.maximum[0] == -torch.inf
    assert found.total[0] == 0.0
    assert found.total[1].isnan()


def check_all(kernel: RowKernel, device: str = "cpu") -> int:
    """Every case; returns how many."""
    cases = list(itertools.product(SIZES, DTYPES))
    for size, dtype in cases:
        check(kernel, size, dtype, device)
    check_edges(kernel, device)
    return len(cases) + 1


if __name__ == "__main__":
    from megatron_seqpar.memory.triton_cross_entropy import TritonRows

    print("checked", check_all(TritonRows()))
