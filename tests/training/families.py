# SPDX-License-Identifier: Apache-2.0
"""Model families: the full-size files of `configs/models`, and small models of the same shape.

A small model is its family's file scaled down by one rule, so that whatever the file says of
biases, norms, windows, activations, tied embeddings and experts is in the small one as well:

- 2 layers;
- query and KV heads halved together while both are even, there are more than 8 query heads and
  more than 2 KV heads: ratios stay, and so do 33 heads;
- a sixteenth of the head dimension;
- hidden size and MLP scaled as heads times head dimension is, the MLP up to a multiple of 8;
- a window of a quarter of the sequence;
- a bound on attention logits of a thousandth, as logits of small new models are that much smaller;
- embeddings times the root of the hidden size, where the file has them so;
- bytes as vocabulary, and no flag that needs Transformer Engine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_seqpar.experiments.training import flags
from megatron_seqpar.mfu import read_flags
from tests.training.runs import ROOT

MODELS = ROOT / "configs" / "models"
LENGTH = 192
"""Tokens of the sequences that small models train on."""

LEFT_OUT = ("vocab-size", "apply-layernorm-1p")
"""The corpus has a vocabulary of its own; the other needs Transformer Engine."""


@dataclass(frozen=True)
class Family:
    """A model file and what its small version is compared with.

    file: its name in `configs/models`.
    parameters: of the published model, or counted by hand where there is none.
    missing: parameters of the published model that Megatron's flags cannot ask for.
    plain: options of textbook attention where stock attention cannot do the same, else None.
    """

    file: str
    parameters: int
    missing: int = 0
    plain: dict[str, Any] | None = field(default=None, hash=False)

    @property
    def path(self) -> Path:
        return MODELS / self.file


FAMILIES = {
    "llama2": Family("llama2-7b.yaml", 6_738_415_616),
    "llama2-gqa": Family("llama2-7b-gqa.yaml", 5_933_109_248),
    "llama2-33-heads": Family("llama2-33-heads.yaml", 7_018_197_120),
    "llama3": Family("llama3-8b.yaml", 8_030_261_248),
    "llama3-70b": Family("llama3-70b.yaml", 70_553_706_496),
    "qwen2.5": Family("qwen2.5-7b.yaml", 7_615_616_512),
    "qwen3": Family("qwen3-8b.yaml", 8_190_735_360),
    "mistral": Family("mistral-7b.yaml", 7_241_732_096),
    "mixtral": Family("mixtral-8x7b.yaml", 46_702_792_704),
    "gemma2": Family(
        "gemma2-9b.yaml",
        9_241_705_984,
        missing=2 * 42 * 3584,  # the norms after attention and after the MLP
        plain={"window": [LENGTH // 4 - 1, 0], "everything": 2, "softcap": 0.05},
    ),
}


def parameters(config: dict[str, Any]) -> int:
    """How many parameters a model has, from the fields of Megatron's model configuration."""
    hidden, heads, width = (
        config["hidden_size"],
        config["num_attention_heads"],
        config["kv_channels"],
    )
    query, both = heads * width, 2 * config["num_query_groups"] * width
    attention = 2 * hidden * query + hidden * both
    if config["add_qkv_bias"]:
        attention += query + both
    if config["qk_layernorm"]:
        attention += 2 * width
    matrices = 3 if config["gated_linear_unit"] else 2
    mlp = matrices * hidden * config["ffn_hidden_size"]
    experts = config["num_moe_experts"]
    if experts:
        mlp = experts * mlp + experts * hidden
    embeddings = config["vocab_size"] * hidden
    if not config["share_embeddings_and_output_weights"]:
        embeddings *= 2
    return embeddings + config["num_layers"] * (attention + mlp + 2 * hidden) + hidden


def heads_of(model: dict[str, Any]) -> tuple[int, int]:
    """Query and KV heads of a model file."""
    heads = int(model["num-attention-heads"])
    return heads, int(model.get("num-query-groups", heads))


def small(path: Path) -> dict[str, Any]:
    """The flags of a model file, scaled down by the rule above."""
    model = {name: value for name, value in read_flags(path).items() if name not in LEFT_OUT}
    heads, kv_heads = heads_of(model)
    width = int(model.get("kv-channels", model["hidden-size"] // heads))
    small_heads, small_kv_heads = heads, kv_heads
    while small_heads > 8 and small_kv_heads > 2 and not (small_heads % 2 or small_kv_heads % 2):
        small_heads, small_kv_heads = small_heads // 2, small_kv_heads // 2
    scale = small_heads * (width // 16) / (heads * width)
    hidden = model["hidden-size"] * scale
    assert hidden == int(hidden), f"{path.name}: hidden size {hidden}"
    model |= {
        "num-layers": 2,
        "hidden-size": int(hidden),
        "ffn-hidden-size": 8 * math.ceil(model["ffn-hidden-size"] * scale / 8),
        "num-attention-heads": small_heads,
        "kv-channels": width // 16,
    }
    if "num-query-groups" in model:
        model["num-query-groups"] = small_kv_heads
    if "window-size" in model:
        model["window-size"] = f"{LENGTH // 4 - 1},0"
    if "seqpar-softcap" in model:
        model["seqpar-softcap"] = model["seqpar-softcap"] / 1000
    if "mup-embedding-mult" in model:
        model["mup-embedding-mult"] = math.sqrt(hidden)
    return model


def arguments(model: dict[str, Any]) -> tuple[str, ...]:
    """Flags as arguments of a run whose weights start alike in every layout."""
    return (*flags(model), "--use-cpu-initialization")


def without_ours(arguments: tuple[str, ...]) -> tuple[str, ...]:
    """Arguments without our flags and their values, for a reference that must not use our parts."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if skip:
            skip = False
        elif argument.startswith("--seqpar-"):
            skip = True
        else:
            kept.append(argument)
    return tuple(kept)
