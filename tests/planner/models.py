# SPDX-License-Identifier: Apache-2.0
"""Models and clusters that the planner's tests share."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from megatron_seqpar.mfu import Model, load_model, model_from_flags
from megatron_seqpar.planner import Cluster, Layout
from megatron_seqpar.planner.constants_file import read_planner_cluster

MODELS = Path(__file__).resolve().parents[2] / "configs" / "models"


@cache
def model(name: str) -> Model:
    """A model of configs/models."""
    return load_model(MODELS / f"{name}.yaml")


@cache
def cluster(name: str = "dgx-a100") -> Cluster:
    """A cluster of configs/planner."""
    return read_planner_cluster(name)


def llama(layers: int, hidden: int, heads: int, ffn: int, vocab: int = 128_000) -> Model:
    """A LLaMA model with a vocabulary of 128,000, as the Layouts study trained."""
    return model_from_flags(
        {
            "num-layers": layers,
            "hidden-size": hidden,
            "num-attention-heads": heads,
            "ffn-hidden-size": ffn,
            "vocab-size": vocab,
            "swiglu": True,
            "untie-embeddings-and-output-weights": True,
        }
    )


LLAMA_13B = llama(40, 5120, 40, 13824)
LLAMA_30B = llama(60, 6656, 52, 17920)
LLAMA_65B = llama(80, 8192, 64, 22016)


def study(
    ranks: int, *, length: int = 2048, tp: int = 1, pp: int = 1, **settings: object
) -> Layout:
    """A layout as the Layouts study ran them: 4M tokens a step, bfloat16 gradients, ZeRO 1."""
    values: dict[str, object] = {
        "parallel_loss": False,
        "fused_loss": False,
        "overlap_dp": False,
        "gradient_bytes": 2,
        "plain_layers": True,
        "copied_reduction": True,
        **settings,
    }
    return Layout(
        sequence_length=length,
        global_batch=2**22 // length,
        tp=tp,
        pp=pp,
        dp=ranks // tp // pp,
        **values,  # type: ignore[arg-type]
    )
