# SPDX-License-Identifier: Apache-2.0
"""The search: what it ranks, what it refuses, and the command that it ends with."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_seqpar.commands.plan import plan as app
from megatron_seqpar.config import FIELDS
from megatron_seqpar.errors import SeqParError, UnsupportedError
from megatron_seqpar.planner.launch import launch_command, layout_flags
from megatron_seqpar.planner.layout import Layout, impossible
from megatron_seqpar.planner.model_file import flags_of_config, read_model
from megatron_seqpar.planner.ranking import BAND
from megatron_seqpar.planner.search import search

from .models import MODELS, cluster, model


def test_long_sequences_are_split_over_the_sequence_axis() -> None:
    """At 128K tokens the 8 KV heads and the node bound TP; the best layouts use SP."""
    found = search(
        model("llama3-8b"), cluster("dgx-h100"), ranks=32, sequence_length=131072, global_batch=32
    )
    assert found.fitting[0].layout.sp > 1
    times = [each.step_time for each in found.fitting]
    assert times[0] <= (1 + BAND) * min(times)
    assert all(each.fits and each.margin >= 0 for each in found.fitting)
    assert all(not each.fits and each.margin < 0 for each in found.nearest)
    for each in found.fitting:
        assert each.layout.ranks == 32
        assert impossible(model("llama3-8b"), each.layout) is None


def test_experts_are_spread() -> None:
    found = search(
        model("mixtral-8x7b"), cluster("dgx-h100"), ranks=64, sequence_length=8192, global_batch=512
    )
    assert found.fitting[0].layout.ep > 1
    # what Megatron and this project refuse with experts is not proposed
    assert not any(each.layout.mlp_chunks for each in found.fitting)
    assert all(each.layout.tp_sp or each.layout.tp == 1 for each in found.fitting)


def test_heads_that_tensor_parallelism_cannot_share_are_named() -> None:
    found = search(
        model("llama2-33-heads"), cluster(), ranks=8, sequence_length=65536, global_batch=8
    )
    assert {each.layout.tp for each in found.fitting} == {1}
    assert any("does not divide 33 heads" in reason for reason, _ in found.refused)


def test_no_possible_layout_is_an_error_with_its_reasons() -> None:
    with pytest.raises(UnsupportedError, match=r"no layout of 7 ranks is possible: .*divide"):
        search(model("llama3-8b"), cluster(), ranks=7, sequence_length=8192, global_batch=8)


def test_what_does_not_fit_says_by_how_much() -> None:
    found = search(model("llama3-8b"), cluster(), ranks=1, sequence_length=131072, global_batch=8)
    assert not found.fitting
    assert found.nearest[0].margin < 0


def _plan(*arguments: str) -> str:
    command = [sys.executable, "-c", _NO_TORCH, "plan", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "torch imported: False" in done.stderr
    return done.stdout


_NO_TORCH = """
import sys
from megatron_seqpar.cli import app
try:
    app(sys.argv[1:], standalone_mode=False)
finally:
    print("torch imported:", "torch" in sys.modules, file=sys.stderr)
"""


def test_the_command_line_needs_no_torch() -> None:
    text = _plan(
        "--model", str(MODELS / "llama3-8b.yaml"), "--cluster", "configs/clusters/dgx-h100.yaml",
        "--nodes", "4", "--seq-length", "131072", "--global-batch-tokens", "4M", "--json",
    )  # fmt: skip
    found = json.loads(text)
    best = found["layouts"][0]
    assert best["fits"]
    assert sum(best["time_s"].values()) == pytest.approx(best["step_time_s"])
    assert best["layout"]["global_batch"] == 32
    assert set(found["constants"]["gemm_share"]) == {"value", "unit", "basis", "source"}
    assert {each["basis"] for each in found["constants"].values()} <= {
        "measured", "calibrated", "published", "assumed",
    }  # fmt: skip
    assert found["command"].startswith("torchrun --nproc-per-node=8 --nnodes=4")


def test_the_table_says_why_and_how_to_start() -> None:
    arguments = ["--model", str(MODELS / "llama3-8b.yaml"), "--nodes", "2", "--seq-length", "32768"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    for text in ("MFU", "margin", "% slower", "does not fit", "-m megatron_seqpar run", "assumed"):
        assert text in done.output


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--gpus", "12"), "more than a node of 8 must be whole nodes"),
        (("--gpus", "8", "--nodes", "1"), "give one of them"),
        (("--global-batch-tokens", "4G"), "4G: use a number"),
        (("--global-batch-tokens", "1K"), "less than one sequence"),
        (("--cluster", "tpu"), "unknown hardware"),
    ],
)
def test_wrong_arguments_are_named(arguments: tuple[str, ...], text: str) -> None:
    done = CliRunner().invoke(app, ["--model", str(MODELS / "llama3-8b.yaml"), *arguments])
    assert isinstance(done.exception, SeqParError)
    assert text in str(done.exception)


@cache
def _megatron_source() -> str:
    """Text of the files in which Megatron declares its arguments, without importing it."""
    [root] = {
        Path(place) for place in importlib.util.find_spec("megatron").submodule_search_locations
    }  # type: ignore[union-attr, arg-type]
    folders = ("training", "core/transformer", "core/distributed", "core")
    files = [path for folder in folders for path in sorted((root / folder).glob("*.py"))]
    files += sorted((root / "training" / "config").glob("*.py"))
    return "\n".join(path.read_text(encoding="utf-8") for path in files)


def _megatron_has(flag: str) -> bool:
    """Declared as an argument, or as the field of a dataclass that arguments are made from."""
    name = flag.removeprefix("--").replace("-", "_")
    declared = re.search(rf"""['"]{flag}['"]|^    {name}:""", _megatron_source(), re.MULTILINE)
    return declared is not None


def test_every_flag_of_the_command_exists() -> None:
    layout = Layout(
        131072, 64, tp=2, sp=4, pp=2, dp=4, ep=2, vpp=2, micro_batch=1, tp_sp=True,
        recompute="attention-output", mlp_chunks=4, loss_chunks=4,
    )  # fmt: skip
    fsdp = Layout(8192, 64, dp=8, zero=3, recompute="full")
    ours = {field.metadata["flag"] for field in FIELDS.values()}
    used = {flag for one in (layout, fsdp) for flag in layout_flags(one) if flag.startswith("--")}
    assert used & ours
    missing = [flag for flag in used - ours if not _megatron_has(flag)]
    assert missing == []
    assert not _megatron_has("--no-such-flag")
    assert "--data-parallel-sharding-strategy optim_grads_params" in " ".join(layout_flags(fsdp))


def test_the_command_holds_the_model_and_the_nodes() -> None:
    flags, _ = read_model(MODELS / "llama3-8b.yaml")
    text = launch_command(Layout(8192, 64, tp=8, dp=2), cluster(), flags)
    assert "--num-layers 32" in text
    assert "--swiglu" in text
    assert "--nnodes=2" in text
    one = launch_command(Layout(8192, 64, tp=4), cluster(), flags)
    assert "--nproc-per-node=4 --standalone" in one


def test_a_hugging_face_configuration_is_the_same_model(tmp_path: Path) -> None:
    config = {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
        "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 32,
        "vocab_size": 128256, "tie_word_embeddings": False, "hidden_act": "silu",
        "rope_theta": 500000.0,
    }  # fmt: skip
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    assert read_model(path)[1] == model("llama3-8b")


def test_hugging_face_experts_and_windows() -> None:
    mixtral = {
        "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336,
        "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 32,
        "vocab_size": 32000, "num_local_experts": 8, "num_experts_per_tok": 2,
        "sliding_window": None,
    }  # fmt: skip
    flags = flags_of_config(mixtral, "x")
    assert flags["num-experts"] == 8
    assert "window-size" not in flags
    windowed = flags_of_config({**mixtral, "sliding_window": 4096}, "x")
    assert windowed["window-size"] == "4095,0"
    with pytest.raises(UnsupportedError, match="model_type gpt2: its layers are not known"):
        flags_of_config({"model_type": "gpt2"}, "x")
