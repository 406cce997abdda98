# SPDX-License-Identifier: Apache-2.0
"""Transformer Engine's and Apex's parts: kept where the stock spec has them, and rightly used.

The real packages need a GPU. Stand-ins with the same arithmetic (`fused_stand_ins`) are enough to
see what a model is built of and that its numbers are those of Megatron's local parts, in one piece
and in several, and when layers run again in backward.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_seqpar.errors import UnsupportedError
from megatron_seqpar.integration import fused_parts
from tests.support.releases import since

# older releases ask Transformer Engine and Apex for other parts
pytestmark = since("0.19", "stand-ins for what it imports")

HERE = Path(__file__).resolve().parent
ROUNDING = 1e-12
SINGLE = 1e-6  # a loss in pieces is computed in fp32, as Megatron's own is
LAYERS = 2
FUSED_PER_LAYER, PROJECTIONS_PER_LAYER = 2, 2


def child(kind: str) -> dict[str, Any]:
    """What `fused_parts` finds with the stand-ins of a kind on the path."""
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(HERE / "fused_stand_ins" / kind), environment.get("PYTHONPATH", "")]
    ).rstrip(os.pathsep)
    done = subprocess.run(
        [sys.executable, "-m", "tests.integration.fused_parts", kind],
        capture_output=True,
        text=True,
        env=environment,
        cwd=HERE.parents[1],
        timeout=280,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def engine() -> dict[str, Any]:
    return child("te")


@pytest.fixture(scope="module")
def apex() -> dict[str, Any]:
    return child("apex")


def test_transformer_engines_parts_stay_where_the_stock_spec_has_them(
    engine: dict[str, Any],
) -> None:
    stock = engine["stock"]
    assert stock == {
        "input_layernorm": "IdentityOp",
        "linear_qkv": "TELayerNormColumnParallelLinear",
        "q_layernorm": "RMSNorm",
        "k_layernorm": "RMSNorm",
        "core_attention": "TEDotProductAttention",
        "linear_proj": "TERowParallelLinear",
        "pre_mlp_layernorm": "IdentityOp",
        "linear_fc1": "TELayerNormColumnParallelLinear",
        "linear_fc2": "TERowParallelLinear",
        "final_layernorm": "RMSNorm",
    }
    assert engine["ours"] == {**stock, "core_attention": "SeqParCoreAttention"}


def test_checkpoints_are_those_of_the_stock_model(engine: dict[str, Any]) -> None:
    assert engine["more state"] == engine["less state"] == []
    assert {"mlp.linear_fc1.layer_norm_weight", "self_attention.linear_qkv.layer_norm_weight"} <= (
        set(engine["checkpoint"])
    )


@pytest.mark.parametrize("run", ["plain", "pieces", "mlp", "attention-qkv",
    "attention-qkv in pieces", "attention-output", "all"])  # fmt: skip
def test_fused_norms_and_linears_give_the_numbers_of_local_ones(
    engine: dict[str, Any], run: str
) -> None:
    """A piece of the MLP goes through its fused norm, and so does what runs again."""
    found = engine["runs"][run]
    assert found["worst"] < (SINGLE if run == "all" else ROUNDING)
    fused = "TELayerNormColumnParallelLinear"
    pieces = 3 if run in ("pieces", "attention-qkv in pieces", "all") else 1
    qkv, mlp = LAYERS, LAYERS * pieces
    assert found["forward"][fused] == qkv + mlp
    assert found["forward"]["TERowParallelLinear"] == qkv + mlp
    again = {
        "plain": 0,
        "pieces": mlp,
        "mlp": mlp,
        "attention-qkv": mlp,
        "attention-qkv in pieces": mlp,
        "attention-output": qkv + mlp,
        "all": qkv + mlp,
    }[run]
    assert found["both"][fused] - found["forward"][fused] == again


def test_apexs_norm_stays_where_the_stock_spec_has_it(apex: dict[str, Any]) -> None:
    norms = ("input_layernorm", "pre_mlp_layernorm", "q_layernorm", "k_layernorm")
    assert {apex["LayerNorm"][name] for name in norms} == {"FusedLayerNorm"}
    assert apex["LayerNorm"]["core_attention"] == "SeqParCoreAttention"
    assert set(apex["RMSNorm"]) == {"WrappedTorchNorm"}, "which Apex's norm is not"


@pytest.mark.parametrize("run", ["plain", "pieces", "mlp", "attention-qkv",
    "attention-qkv in pieces", "attention-output", "all"])  # fmt: skip
def test_what_runs_again_runs_apexs_norm_again(apex: dict[str, Any], run: str) -> None:
    found = apex["runs"][run]
    assert found["worst"] < (SINGLE if run == "all" else ROUNDING)
    in_layers, at_the_end = 4 * LAYERS, 1  # before attention and MLP, of queries and of keys
    assert found["forward"]["forward"] == in_layers + at_the_end
    again = {"attention-qkv": 2 * LAYERS, "attention-qkv in pieces": 2 * LAYERS}.get(run, 0)
    if run in ("attention-output", "all"):
        again = in_layers
    assert found["both"]["forward"] - found["forward"]["forward"] == again
    assert found["both"]["backward"] == in_layers + at_the_end


def test_what_is_there_is_said(engine: dict[str, Any], apex: dict[str, Any]) -> None:
    assert engine["told"] == (
        "seqpar: norms and linear layers are Transformer Engine's; "
        "Transformer Engine 2.2.0 is installed, Apex is not installed"
    )
    assert apex["told"] == (
        "seqpar: linear layers are Megatron's, norms torch's RMSNorm or Apex's LayerNorm; "
        "Transformer Engine is not installed, Apex is installed"
    )


def test_layers_of_an_engine_that_is_not_installed_are_refused() -> None:
    args = SimpleNamespace(transformer_impl="transformer_engine", spec=None, rank=0)
    with pytest.raises(
        UnsupportedError, match=r"--transformer-impl transformer_engine.*local --no"
    ):
        fused_parts.check(args)


def test_parts_are_said_once_on_rank_0(capsys: pytest.CaptureFixture[str]) -> None:
    for rank in (0, 1):
        fused_parts.check(SimpleNamespace(transformer_impl="local", rank=rank))
    assert capsys.readouterr().out.splitlines() == [fused_parts.line("local")]
    fused_parts.check(SimpleNamespace(transformer_impl="transformer_engine", spec=["a", "b"]))
