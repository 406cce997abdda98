# SPDX-License-Identifier: Apache-2.0
"""Megatron's flags on a CPU: added, kept or refused by name."""

import pytest

from megatron_seqpar.cpu_runtime import cpu_arguments
from megatron_seqpar.cpu_runtime.arguments import ADDITIONS, REFUSALS
from megatron_seqpar.errors import SeqParError, UnsupportedError


def test_adds_what_a_cpu_needs_and_says_why() -> None:
    argv, notes = cpu_arguments(["--num-layers", "2"])
    assert argv[:2] == ["--num-layers", "2"]
    assert argv[2:4] == ["--transformer-impl", "local"]
    assert "--no-rope-fusion" in argv
    assert len(notes) == len(ADDITIONS)
    assert notes[0] == "--transformer-impl local (Transformer Engine needs CUDA)"


def test_is_idempotent_and_keeps_the_users_flags() -> None:
    once, _ = cpu_arguments(["--transformer-impl=local", "--no-rope-fusion"])
    assert once.count("--no-rope-fusion") == 1
    assert "--transformer-impl" not in once
    assert cpu_arguments(once) == (once, [])


@pytest.mark.parametrize(
    ("argv", "named", "instead"),
    [
        (["--transformer-impl", "transformer_engine"], "transformer_engine", "local"),
        (["--transformer-impl=transformer_engine"], "transformer_engine", "local"),
        (["--distributed-backend", "nccl"], "--distributed-backend nccl", "gloo"),
        (["--fp8-format", "hybrid"], "--fp8-format", "--bf16"),
        (["--use-megatron-fsdp"], "--use-megatron-fsdp", "--use-distributed-optimizer"),
        (["--cuda-graph-impl", "local"], "--cuda-graph-impl local", "none"),
        (["--moe-token-dispatcher-type", "flex"], "flex", "alltoall"),
    ],
)
def test_refuses_what_a_cpu_cannot_serve(argv: list[str], named: str, instead: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        cpu_arguments(argv)
    assert named in str(caught.value)
    assert instead in str(caught.value)
    assert isinstance(caught.value, SeqParError)


def test_values_a_cpu_can_serve_pass() -> None:
    argv = [token for refusal in REFUSALS for token in (refusal.flag, *refusal.allowed[:1])]
    pairs = [r for r in REFUSALS if r.allowed]
    served = [token for r in pairs for token in (r.flag, r.allowed[0])]
    assert cpu_arguments(served)[0][: len(served)] == served
    with pytest.raises(UnsupportedError):
        cpu_arguments(argv)
