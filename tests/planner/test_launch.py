# SPDX-License-Identifier: Apache-2.0
"""Every launch command that `plan` prints is one that Megatron and the plugin take."""

from __future__ import annotations

import shlex
from typing import Any

import pytest

from megatron_seqpar.launcher.dry_run import Order, check
from megatron_seqpar.planner import Layout, search
from megatron_seqpar.planner.launch import launch_command
from megatron_seqpar.planner.layout import impossible
from megatron_seqpar.planner.model_file import read_model
from megatron_seqpar.shipped import pretraining_script

from .models import MODELS, cluster, model

SCRIPT = pretraining_script()
USERS = shlex.split(
    "--train-iters 1 --lr 1e-4 --mock-data --tokenizer-type NullTokenizer "
    "--no-create-attention-mask-in-dataloader"
)
"""What the planner leaves to the user: data and training length."""
HAND_MADE = [
    ("llama3-8b", Layout(8192, 64, dp=8, zero=0)),
    ("llama3-8b", Layout(8192, 64, dp=8, micro_batch=4)),
    ("llama3-8b", Layout(8192, 64, tp=2, pp=4, dp=2, vpp=4, tp_sp=True)),
    ("llama3-8b", Layout(8192, 64, tp=8, dp=4, recompute="selective")),
    ("llama3-8b", Layout(8192, 64, tp=4, pp=2, recompute="full", zero=0)),
    ("llama3-8b", Layout(131072, 32, tp=2, sp=4, dp=4, tp_sp=True)),
    ("llama3-8b", Layout(131072, 32, sp=16, recompute="mlp", schedule="zigzag")),
    ("llama3-8b", Layout(131072, 32, sp=8, recompute="attention-qkv", schedule="ulysses")),
    (
        "llama3-8b",
        Layout(
            131072, 32, tp=2, sp=4, pp=2, dp=2, vpp=2, tp_sp=True, recompute="attention-output",
            mlp_chunks=4, loss_chunks=16, schedule="ring",
        ),
    ),
    ("llama3-8b", Layout(8192, 64, sp=4, recompute="attention-output", schedule="allgather")),
    ("llama3-8b", Layout(8192, 64, dp=8, zero=2)),
    ("llama3-8b", Layout(8192, 64, dp=16, zero=3, recompute="full")),
    ("llama3-8b", Layout(8192, 64, tp=2, dp=8, zero=3, tp_sp=True)),
    ("mixtral-8x7b", Layout(8192, 64, tp=2, dp=8, ep=8, tp_sp=True)),
    ("mixtral-8x7b", Layout(8192, 64, pp=2, dp=4, ep=4, vpp=2, recompute="attention-output")),
    ("mixtral-8x7b", Layout(32768, 64, sp=2, dp=4, ep=8, loss_chunks=8)),
    ("gemma2-9b", Layout(8192, 64, tp=2, dp=4)),
    ("qwen3-8b", Layout(32768, 64, tp=4, sp=2, pp=2, recompute="mlp", mlp_chunks=8)),
]  # fmt: skip


def found_by_search() -> list[tuple[str, Layout]]:
    """The best layouts of a spread of searches."""
    cases = []
    for name, ranks, length, batch in (
        ("llama3-8b", 32, 131072, 32),
        ("llama3-8b", 8, 8192, 512),
        ("llama2-7b", 16, 32768, 128),
        ("mixtral-8x7b", 32, 16384, 256),
        ("qwen3-8b", 64, 262144, 16),
    ):
        found = search(
            model(name), cluster("dgx-h100"), ranks=ranks, sequence_length=length,
            global_batch=batch, keep=6,
        )  # fmt: skip
        cases += [(name, each.layout) for each in found.fitting]
    return cases


Answers = list[tuple[str, Layout, dict[str, Any]]]


@pytest.fixture(scope="module")
def taken() -> Answers:
    """What Megatron and the plugin make of the commands of all layouts, as on Hopper GPUs."""
    pytest.importorskip("megatron.training")
    cases = [*HAND_MADE, *found_by_search()]
    orders: dict[str, list[tuple[int, Order]]] = {}
    for number, (name, layout) in enumerate(cases):
        flags = read_model(MODELS / f"{name}.yaml")[0]
        connections, order = order_of(launch_command(layout, cluster("dgx-h100"), flags))
        assert order.ranks == layout.ranks
        orders.setdefault(connections, []).append((number, order))
    answers: dict[int, dict[str, Any]] = {}
    with pytest.MonkeyPatch.context() as patched:
        for connections, numbered in orders.items():
            patched.setenv("CUDA_DEVICE_MAX_CONNECTIONS", connections)
            checked = check([order for _, order in numbered], device="cuda")
            for (number, _), one in zip(numbered, checked, strict=True):
                answers[number] = {"error": one.error, **one.resolved}
    return [(*case, answers[number]) for number, case in enumerate(cases)]


def order_of(command: str) -> tuple[str, Order]:
    """A printed command as its user would start it: CUDA_DEVICE_MAX_CONNECTIONS, and the rest."""
    words = shlex.split(command)
    at, script = words.index("torchrun"), words.index("pretrain_gpt.py")
    given = dict(word.split("=", 1) for word in words[:at])
    options = dict(w[2:].split("=", 1) for w in words[at:script] if w.startswith("--n"))
    each = int(options["nproc-per-node"])
    assert words[script - 3 : script] == ["-m", "megatron_seqpar", "run"]
    arguments = (*words[script + 1 :], *USERS)
    order = Order(str(SCRIPT), arguments, each * int(options.get("nnodes", "1")), each)
    return given.get("CUDA_DEVICE_MAX_CONNECTIONS", "1"), order  # 1 is the launcher's


def test_layouts_of_the_list_are_possible() -> None:
    assert [impossible(model(name), layout) for name, layout in HAND_MADE] == [None] * len(
        HAND_MADE
    )


def test_megatron_and_the_plugin_take_every_command(taken: Answers) -> None:
    refused = [(*case, found["error"]) for *case, found in taken if found["error"] is not None]
    assert refused == []
    assert len(taken) > 30


def test_what_they_take_is_the_layout(taken: Answers) -> None:
    """`resolved` has what is not at its default."""
    for name, layout, found in taken:
        own = layout.recompute not in ("none", "full", "selective")
        expected = {
            "tensor_model_parallel_size": (layout.tp, 1),
            "context_parallel_size": (layout.sp, 1),  # the axis in its place
            "pipeline_model_parallel_size": (layout.pp, 1),
            "data_parallel_size": (layout.dp, None),
            "expert_model_parallel_size": (layout.ep, 1),
            "virtual_pipeline_model_parallel_size": (layout.vpp, 1),
            "micro_batch_size": (layout.micro_batch, None),
            "global_batch_size": (layout.global_batch, None),
            "seq_length": (layout.sequence_length, None),
            "sequence_parallel": (layout.tp_sp and layout.tp > 1, False),
            "use_distributed_optimizer": (layout.zero >= 1, False),
            "use_megatron_fsdp": (layout.zero >= 2, False),
            "recompute_granularity": (None if own else layout.recompute, "none"),
            "seqpar_recompute": (layout.recompute if own else "none", "none"),
            "seqpar_mlp_chunks": (str(layout.mlp_chunks or "off"), "off"),
            "seqpar_loss_chunks": (str(layout.loss_chunks or "off"), "off"),
            "bf16": (True, False),
        }
        for flag, (wanted, default) in expected.items():
            assert (found.get(flag) or default) == (wanted or default), (flag, name, layout)
        if layout.sp > 1:
            assert found.get("seqpar_schedule", "auto") == layout.schedule
