# SPDX-License-Identifier: Apache-2.0
"""The settings and the flags generated from them."""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys

import pytest

from megatron_seqpar import config as settings
from megatron_seqpar.config import GROUP_TITLE, SeqParConfig
from megatron_seqpar.errors import UnsupportedError


def parse(*argv: str) -> SeqParConfig:
    parser = settings.add_arguments(argparse.ArgumentParser(allow_abbrev=False))
    return settings.from_namespace(parser.parse_args(argv))


def test_defaults_leave_megatron_alone():
    config = parse()
    assert config == SeqParConfig()
    assert not config.active
    assert not config.replaces_core_attention


def test_every_field_has_its_flag():
    flags = {field.metadata["flag"] for field in dataclasses.fields(SeqParConfig)}
    assert flags == {
        "--sequence-parallel-size",
        "--seqpar-schedule",
        "--seqpar-token-layout",
        "--seqpar-mask",
        "--seqpar-softcap",
        "--seqpar-node-size",
        "--seqpar-cluster",
        "--seqpar-kernel",
        "--seqpar-recompute",
        "--seqpar-mlp-chunks",
        "--seqpar-loss-chunks",
        "--seqpar-memory-budget",
        "--seqpar-offload",
        "--seqpar-no-overlap",
        "--seqpar-report",
        "--seqpar-peak-tflops",
        "--seqpar-no-summary",
        "--seqpar-telemetry-interval",
        "--seqpar-trace",
        "--seqpar-trace-steps",
    }


def test_flags_are_read():
    config = parse(
        "--sequence-parallel-size", "4", "--seqpar-schedule", "ring", "--seqpar-no-overlap"
    )
    assert config == SeqParConfig(sequence_parallel_size=4, schedule="ring", overlap=False)
    assert config.active
    assert config.replaces_core_attention


def test_numbers_are_numbers():
    config = parse("--seqpar-softcap", "30", "--sequence-parallel-size", "4")
    assert config.softcap == 30.0
    assert config.node_size is None
    config = parse("--sequence-parallel-size", "4", "--seqpar-node-size", "2")
    assert config.node_size == 2
    assert SeqParConfig(softcap=30.0).replaces_core_attention


@pytest.mark.parametrize(
    "argv",
    [
        ("--seqpar-kernel", "cpu"),
        ("--seqpar-mask", "prefix:64"),
        ("--seqpar-softcap", "50.0"),
        ("--seqpar-recompute", "attention-output"),
    ],
)
def test_what_only_our_attention_does_replaces_core_attention_on_one_rank(argv):
    config = parse(*argv)
    assert not config.active
    assert config.replaces_core_attention
    assert config.reason_without_axis == " ".join(argv)


def test_help_has_a_group_of_its_own_with_the_choices():
    text = settings.add_arguments(argparse.ArgumentParser()).format_help()
    assert GROUP_TITLE in text
    assert "{auto,balanced,zigzag,ring" in text
    assert "{contiguous,zigzag}" in text


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (("--seqpar-schedule", "spiral"), "--seqpar-schedule spiral.*auto, balanced"),
        (("--seqpar-recompute", "all"), "--seqpar-recompute all.*none"),
        (("--seqpar-offload", "stash"), "--seqpar-offload stash with --seqpar-recompute none"),
        (
            ("--seqpar-offload", "stash", "--seqpar-recompute", "mlp"),
            "--seqpar-recompute mlp.*Add --seqpar-recompute attention-output",
        ),
        (("--seqpar-mlp-chunks", "0"), "--seqpar-mlp-chunks 0.*auto, off or 1"),
        (("--seqpar-loss-chunks", "some"), "--seqpar-loss-chunks some.*auto, off or 1"),
        (("--seqpar-memory-budget", "-1"), "--seqpar-memory-budget -1.0.*positive"),
        (("--seqpar-peak-tflops", "0"), "--seqpar-peak-tflops 0.0.*positive, in TFLOP/s"),
        (("--seqpar-telemetry-interval", "-1"), "--seqpar-telemetry-interval -1.0.*positive, or 0"),
        (("--seqpar-offload", "disk"), "--seqpar-offload disk.*none, stash"),
        (("--seqpar-trace-steps", "3,x"), "--seqpar-trace-steps 3,x: 'x' is neither.*use 3, 3-5"),
        (("--seqpar-trace-steps", "5-3"), "'5-3' is neither"),
        (("--seqpar-trace-steps", "0"), "'0' is neither"),
        (("--sequence-parallel-size", "two"), "--sequence-parallel-size two: not a number"),
        (("--sequence-parallel-size", "0"), "--sequence-parallel-size 0.*1 or more"),
        (("--seqpar-token-layout", "spiral"), "--seqpar-token-layout spiral.*contiguous, zigzag"),
        (("--seqpar-mask", "prefix:long"), "--seqpar-mask prefix:long.*prefix:LENGTH"),
        (("--seqpar-mask", "window:-3"), "--seqpar-mask window:-3.*window:LEFT"),
        (("--seqpar-softcap", "-1"), "--seqpar-softcap -1.0: the bound must be positive"),
        (("--seqpar-softcap", "nan"), "--seqpar-softcap nan: the bound"),
        (("--seqpar-softcap", "much"), "--seqpar-softcap much: not a number. Use .* 50.0"),
        (("--seqpar-node-size", "2"), "--seqpar-node-size 2 with --sequence-parallel-size 1:"),
        (("--seqpar-node-size", "all"), "--seqpar-node-size all: not a number. Use 1 or more"),
    ],
)
def test_wrong_values_name_the_flag_and_the_choices(argv, text):
    with pytest.raises(UnsupportedError, match=text):
        parse(*argv)


def test_traced_steps():
    config = parse("--seqpar-trace-steps", "3, 10-12")
    assert [step for step in range(1, 20) if config.traced(step)] == [3, 10, 11, 12]


def test_choices_of_schedules_are_those_that_exist():
    from megatron_seqpar.attention import schedules

    field = next(f for f in dataclasses.fields(SeqParConfig) if f.name == "schedule")
    assert set(field.metadata["choices"]) == {"auto", *schedules.names()}


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SeqParConfig().schedule = "ring"


def test_config_imports_neither_torch_nor_megatron():
    code = (
        "import sys, megatron_seqpar.config;"
        "sys.exit(any(name.split('.')[0] in ('torch', 'megatron') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
