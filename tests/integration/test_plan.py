# SPDX-License-Identifier: Apache-2.0
"""The schedule of a run, built from Megatron's arguments before the first step."""

from __future__ import annotations

import types

import pytest
import torch

from megatron_seqpar.attention import Causal, build_schedule
from megatron_seqpar.config import SeqParConfig
from megatron_seqpar.errors import ClusterError, UnsupportedError
from megatron_seqpar.integration import nodes, state
from megatron_seqpar.simulate import load_cluster

pytest.importorskip("megatron.core")

from megatron_seqpar.integration import plan


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    yield
    state.set_config(SeqParConfig())


def asked(**options) -> SeqParConfig:
    config = SeqParConfig(**{"sequence_parallel_size": 4, **options})
    state.set_config(config)
    return config


def arguments(**more) -> types.SimpleNamespace:
    values = {
        "seq_length": 256,
        "num_layers": 4,
        "num_attention_heads": 8,
        "group_query_attention": True,
        "num_query_groups": 2,
        "kv_channels": 16,
        "tensor_model_parallel_size": 1,
        "micro_batch_size": 1,
        "params_dtype": torch.bfloat16,
        "rank": 0,
    }
    return types.SimpleNamespace(**{**values, **more})


LATENT = {
    "multi_latent_attention": True,
    "qk_head_dim": 24,
    "qk_pos_emb_head_dim": 8,
    "v_head_dim": 20,
}


@pytest.mark.parametrize(
    ("options", "heads"),
    [
        ({}, (8, 2, 16, 16)),
        ({"tensor_model_parallel_size": 2}, (4, 1, 16, 16)),
        ({"tensor_model_parallel_size": 4}, (2, 1, 16, 16)),
        ({"group_query_attention": False}, (8, 8, 16, 16)),
        ({**LATENT, "tensor_model_parallel_size": 2}, (4, 4, 32, 20)),
    ],
)
def test_heads_of_one_tensor_parallel_rank(options, heads):
    names = ("query_heads", "kv_heads", "head_dim", "value_dim")
    assert plan.heads_of(arguments(**options)) == dict(zip(names, heads, strict=True))


def test_the_schedule_is_the_one_that_attention_will_ask_for():
    config = asked(schedule="ring")
    (planned,) = plan.of_run(arguments(), config)
    assert planned.why == ""
    later = build_schedule(
        "ring",
        size=4,
        seq_length=256,
        mask=Causal(),
        query_heads=8,
        kv_heads=2,
        head_dim=16,
        value_dim=16,
        node_size=4,
        dtype=torch.bfloat16,
    )
    assert later is planned.schedule


def test_one_schedule_for_each_mask_of_the_model():
    config = asked(schedule="zigzag", token_layout="zigzag")
    args = arguments(window_size=(40, 0), window_attn_skip_freq=2)
    problems = [planned.schedule.problem for planned in plan.of_run(args, config)]
    assert [problem.mask.name for problem in problems] == ["window", "causal"]
    assert all(problem.layout.name == "zigzag" for problem in problems)


@pytest.mark.parametrize(
    ("settings", "options", "text"),
    [
        (
            {"schedule": "balanced", "mask": "prefix:64"},
            {},
            r"--seqpar-schedule balanced, .*-size 4 and a prefix mask: .*does not serve",
        ),
        (
            {"schedule": "balanced"},
            {"window_size": (16, 0), "window_attn_skip_freq": None},
            r"--seqpar-schedule balanced, .* a window mask: .*does not serve",
        ),
        (
            {"schedule": "balanced", "token_layout": "zigzag"},
            {},
            r"--seqpar-schedule balanced, --seqpar-token-layout zigzag with .* a causal mask: ",
        ),
        ({"schedule": "ulysses+balanced"}, {}, r"needs several nodes"),
        ({"mask": "documents:300", "schedule": "ring"}, {}, r"documents mask: .*300"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, options, text):
    with pytest.raises(UnsupportedError, match=text):
        plan.check(arguments(**options), asked(**settings))


def test_the_first_rank_says_it(capsys):
    config = asked(schedule="ring")
    plan.check(arguments(rank=1), config)
    assert capsys.readouterr().out == ""
    plan.check(arguments(micro_batch_size=3), config)
    (line,) = capsys.readouterr().out.splitlines()
    (planned,) = plan.of_run(arguments(), config)
    schedule = planned.schedule
    both = ("forward", "backward")
    sent = sum(schedule.bytes_sent(r, d, "bfloat16", batch=3) for r in range(4) for d in both)
    assert f"{100 * schedule.idle_fraction:.1f}% idle" in line
    assert f"{sent / 4 / 2**20:.3g} MiB sent per rank" in line
    assert "causal attention over 256 tokens on 4 ranks (8 query and 2 KV heads each)" in line


def test_one_rank_is_checked_and_says_nothing(capsys):
    plan.check(arguments(), asked(sequence_parallel_size=1, mask="prefix:64"))
    assert capsys.readouterr().out == ""
    with pytest.raises(UnsupportedError, match=r"--seqpar-schedule balanced, .* a prefix mask"):
        plan.check(
            arguments(), asked(sequence_parallel_size=1, mask="prefix:64", schedule="balanced")
        )


def test_auto_says_what_it_chose_and_why(capsys):
    config = asked(cluster="dgx-h100")
    args = arguments(micro_batch_size=2)
    plan.check(args, config)
    (line,) = capsys.readouterr().out.splitlines()
    (planned,) = plan.of_run(args, config)
    assert f"schedule {planned.schedule.name} for causal" in line
    assert f"auto chose {planned.schedule.name}: " in line
    assert "on dgx-h100" in line
    later = build_schedule(
        "auto",
        size=4,
        seq_length=256,
        query_heads=8,
        kv_heads=2,
        head_dim=16,
        dtype=torch.bfloat16,
        batch=2,
        cluster=nodes.cluster_of(config, 4),
    )
    assert later is planned.schedule


def test_an_unknown_cluster_is_refused_with_the_known_ones():
    with pytest.raises(ClusterError, match=r"--seqpar-cluster abacus: .*dgx-h100"):
        plan.check(arguments(), asked(cluster="abacus"))


def test_axes_of_a_node_share_its_adapters(monkeypatch):
    """8 processes a node, TP=2, an axis of 8: two axes talk through the node's adapters."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    config = asked(sequence_parallel_size=8, cluster="dgx-h100")
    node_size = nodes.of_axis(range(0, 16, 2), config)
    assert node_size == 4
    whole, seen = load_cluster("dgx-h100"), nodes.cluster_of(config, node_size)
    assert seen.ranks_per_node.value == 4
    assert seen.adapters.value * 2 == whole.adapters.value


def test_models_without_attention_or_length_have_no_schedule():
    assert list(plan.of_run(arguments(num_attention_heads=None), asked())) == []
    assert list(plan.of_run(arguments(seq_length=None), asked())) == []
