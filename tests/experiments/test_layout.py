# SPDX-License-Identifier: Apache-2.0
"""Parallel layouts: their flags, and the constraint that each impossible one breaks."""

import pytest

from megatron_seqpar.experiments.layout import Layout
from megatron_seqpar.mfu import model_from_flags

SIZES = {
    "num-layers": 4,
    "hidden-size": 64,
    "num-attention-heads": 8,
    "num-query-groups": 2,
    "vocab-size": 256,
}
MODEL = model_from_flags(SIZES)


@pytest.mark.parametrize(
    ("layout", "says"),
    [
        (Layout(4, tp=3), "TP x SP x CP x PP = 3 does not divide 4 ranks"),
        (Layout(3, tp=3), "TP 3 does not divide 8 query heads"),
        (Layout(4, pp=4, vpp=2), "PP x VPP = 8 does not divide 4 layers"),
        (Layout(4, vpp=2), "VPP 2 needs PP above 1"),
        (Layout(4, sp=4, tp_sp=True), "TP-SP needs TP above 1"),
        (Layout(4, sp=2, ep=2), "EP 2 does not divide 0 experts"),
        (Layout(4, micro_batch=2), "DP x micro-batch = 8 does not divide a global batch of 4"),
        (Layout(4, cp=2, sp=2), "CP together with SP"),
        (Layout(4, cp=4, kernel="cpu"), "CP runs on Transformer Engine's attention"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.label(),
)
def test_what_cannot_be_names_its_constraint(layout, says):
    assert says in layout.impossible(MODEL, 4)


@pytest.mark.parametrize(
    "layout",
    [Layout(8, tp=8), Layout(4, tp=2, sp=2), Layout(4, pp=2, vpp=2), Layout(4, tp=4, tp_sp=True)],
    ids=Layout.label,
)
def test_what_can_be(layout):
    """TP=8 on two KV heads: Megatron gives each rank a copy of one."""
    assert layout.impossible(MODEL, 4) is None


def test_heads_that_do_not_divide_one_another():
    model = model_from_flags({**SIZES, "num-attention-heads": 12, "num-query-groups": 3})
    assert "TP 2 and 3 KV heads" in Layout(2, tp=2).impossible(model, 2)
    assert Layout(3, tp=3).impossible(model, 3) is None


def test_flags():
    layout = Layout(
        16, tp=2, sp=2, pp=2, tp_sp=True, zero=1, recompute="attention-output", kernel="cpu",
        schedule="zigzag", mlp_chunks="4", loss_chunks="auto", vpp=2,
    )  # fmt: skip
    assert layout.dp == 2
    assert " ".join(layout.arguments()) == (
        "--tensor-model-parallel-size 2 --sequence-parallel-size 2 "
        "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 "
        "--sequence-parallel --use-distributed-optimizer --seqpar-recompute attention-output "
        "--seqpar-mlp-chunks 4 --seqpar-loss-chunks auto --seqpar-schedule zigzag "
        "--seqpar-kernel cpu"
    )
    assert layout.label() == (
        "TP=2 SP=2 PP=2 VPP=2 DP=2 TP-SP ZeRO-1 attention-output recompute MLP chunks 4 "
        "loss chunks auto zigzag"
    )
    assert Layout(1).arguments() == []
    assert Layout(1).label() == "one rank"
