# SPDX-License-Identifier: Apache-2.0
"""What `auto` chunks reckon with: this rank's share of model, memory and micro-batches."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("megatron.core")

from megatron_seqpar.config import SeqParConfig
from megatron_seqpar.errors import UnsupportedError
from megatron_seqpar.integration import memory_plan, state
from megatron_seqpar.memory.choose import Choice
from tests.integration.runs import launch, trained

MIXED = {
    "params_dtype": torch.bfloat16,
    "optimizer": "adam",
    "accumulate_allreduce_grads_in_fp32": True,
    "use_distributed_optimizer": False,
    "data_parallel_size": 4,
    "context_parallel_size": 2,
    "optimizer_cpu_offload": False,
}


@pytest.mark.parametrize(
    ("changes", "dtype", "per_parameter"),
    [
        ({}, torch.bfloat16, 2 + 4 + 4 + 8),
        ({"use_distributed_optimizer": True}, torch.bfloat16, 2 + 4 + 12 / 8),
        ({"accumulate_allreduce_grads_in_fp32": False}, torch.bfloat16, 2 + 2 + 12),
        ({"optimizer": "sgd"}, torch.bfloat16, 2 + 4 + 4 + 4),
        ({"params_dtype": torch.float32}, torch.float32, 4 + 4 + 8),
        (
            {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5},
            torch.bfloat16,
            2 + 4 + 6,
        ),
    ],
    ids=["mixed", "distributed", "bf16-gradients", "sgd", "fp32", "offloaded"],
)
def test_bytes_of_model_state(changes, dtype, per_parameter) -> None:
    parameters = [torch.empty(10, 20, dtype=dtype), torch.empty(40, dtype=dtype)]
    args = SimpleNamespace(**{**MIXED, **changes})
    assert memory_plan.state_bytes(args, parameters) == round(240 * per_parameter)


@pytest.mark.parametrize(
    ("stages", "stage", "batches", "chunks", "expected"),
    [
        (1, 0, 8, None, 1),
        (4, 0, 8, None, 4),
        (4, 3, 8, None, 1),
        (4, 0, 2, None, 2),
        (4, 0, 8, 2, 2 * 3 + 4 + 1),
        (4, 3, 8, 2, 4 + 1),
        (2, 0, 1, 2, 2),
    ],
)
def test_passes_in_flight(monkeypatch, stages, stage, batches, chunks, expected) -> None:
    """1F1B keeps as many micro-batches as there are stages from here to the last one."""
    from megatron.core import num_microbatches_calculator, parallel_state

    monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_rank", lambda: stage)
    monkeypatch.setattr(num_microbatches_calculator, "get_num_microbatches", lambda: batches)
    args = SimpleNamespace(
        pipeline_model_parallel_size=stages, virtual_pipeline_model_parallel_size=chunks
    )
    assert memory_plan.in_flight(args) == expected


def test_the_budget_is_what_the_user_says() -> None:
    assert memory_plan.budget_bytes(SeqParConfig(memory_budget=1.5)) == 3 * 2**29


def test_megatrons_full_recomputation_counts() -> None:
    full = SimpleNamespace(recompute_granularity="full")
    none = SimpleNamespace(recompute_granularity=None)
    assert memory_plan.recompute_of(full, SeqParConfig()) == "full"
    assert memory_plan.recompute_of(none, SeqParConfig()) == "none"
    assert memory_plan.recompute_of(none, SeqParConfig(recompute="mlp")) == "mlp"


def test_what_is_said_of_a_choice() -> None:
    said = memory_plan.line(Choice(0, 4, "reasons"), stage=1)
    assert said == (
        "seqpar: auto computes MLPs whole (chunks off) and the loss in 4 pieces on pipeline stage "
        "1: reasons"
    )
    assert "does not fit" in memory_plan.line(Choice(8, 8, "reasons", fits=False))


def test_auto_without_the_training_loop_is_refused() -> None:
    state.set_config(SeqParConfig(mlp_chunks="auto", loss_chunks="3"))
    try:
        assert state.loss_chunks() == 3
        with pytest.raises(UnsupportedError, match=r"--seqpar-mlp-chunks auto.*Give a number"):
            state.mlp_chunks()
        state.set_chosen(state.ChosenChunks(mlp=2, loss=9))
        assert (state.mlp_chunks(), state.loss_chunks()) == (2, 3)
    finally:
        state.set_config(SeqParConfig())


@pytest.mark.slow
def test_a_run_with_too_little_memory_is_cut_and_trains_the_same() -> None:
    """Tensor-parallel ranks must cut alike: they communicate in every piece."""
    pytest.importorskip("megatron.training")
    layout = ["--tensor-model-parallel-size", "2", "--sequence-parallel", "--seqpar-kernel", "cpu"]
    length = ["--seq-length", "1024", "--max-position-embeddings", "1024"]
    auto = ["--seqpar-mlp-chunks", "auto", "--seqpar-loss-chunks", "auto"]
    whole = trained(launch(2, *layout, *length, *auto))
    assert "MLPs whole (chunks off) and the loss whole (chunks off)" in whole.text
    tight = trained(launch(2, *layout, *length, *auto, "--seqpar-memory-budget", "0.001"))
    assert "MLPs in 4 pieces and the loss in 4 pieces" in tight.text
    assert "does not fit by the formulas" in tight.text
    assert tight.losses == pytest.approx(whole.losses, rel=1e-6)
