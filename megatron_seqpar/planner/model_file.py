# SPDX-License-Identifier: Apache-2.0
"""A model from a file: Megatron's flags as YAML (configs/models), or a Hugging Face config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import SeqParError, UnsupportedError
from ..mfu import Model, model_from_flags, read_flags

_GATED = ("silu", "swish", "swiglu")
_GEGLU = ("gelu_pytorch_tanh", "gelu_tanh", "gelu_new")
_GATED_FAMILIES = (
    "llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "gemma2",
    "gemma3_text", "phi3", "deepseek_v2", "deepseek_v3", "olmo2", "granite",
)  # fmt: skip


def read_model(path: Path) -> tuple[dict[str, Any], Model]:
    """Megatron's flags of a model file, and the model that they describe.

    Raises SeqParError for what cannot be read, and UnsupportedError for a family whose layers are
    not known.
    """
    flags = _from_hugging_face(path) if path.suffix == ".json" else read_flags(path)
    return flags, model_from_flags(flags, str(path))


def _from_hugging_face(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise SeqParError(f"--model {path}: cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise SeqParError(f"--model {path}: a Hugging Face config.json is a mapping")
    return flags_of_config(content, str(path))


def flags_of_config(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Megatron's flags of a Hugging Face configuration, as far as sizes go."""
    family = str(config.get("model_type"))
    if family not in _GATED_FAMILIES:
        raise UnsupportedError(
            f"--model {source}: model_type {family}: its layers are not known; use one of "
            f"{', '.join(_GATED_FAMILIES)}, or a file of Megatron's flags"
        )
    missing = [
        name
        for name in ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
        if config.get(name) is None
    ]
    if missing:
        raise SeqParError(f"--model {source}: {missing[0]} is missing")
    flags: dict[str, Any] = {
        "num-layers": config["num_hidden_layers"],
        "hidden-size": config["hidden_size"],
        "ffn-hidden-size": config.get("intermediate_size"),
        "num-attention-heads": config["num_attention_heads"],
        "vocab-size": config["vocab_size"],
        "normalization": "RMSNorm",
        "position-embedding-type": "rope",
        "untie-embeddings-and-output-weights": not config.get(
            "tie_word_embeddings", family.startswith("gemma")
        ),
        "disable-bias-linear": True,
        **_activation(config, source),
    }
    groups = config.get("num_key_value_heads")
    if groups is not None and groups != config["num_attention_heads"]:
        flags |= {"group-query-attention": True, "num-query-groups": groups}
    if config.get("head_dim"):
        flags["kv-channels"] = config["head_dim"]
    if config.get("rope_theta"):
        flags["rotary-base"] = int(config["rope_theta"])
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        flags["window-size"] = f"{config['sliding_window'] - 1},0"
        if family == "gemma2":
            flags["window-attn-skip-freq"] = 2
    if config.get("kv_lora_rank"):
        flags |= _latent(config)
    return flags | _experts(config, family)


def _activation(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    name = config.get("hidden_activation") or config.get("hidden_act", "silu")
    if name in _GATED:
        return {"swiglu": True}
    if name in _GEGLU:
        return {"quick-geglu": True}
    raise UnsupportedError(f"--model {source}: hidden_act {name}: use a file of Megatron's flags")


def _latent(config: Mapping[str, Any]) -> dict[str, Any]:
    flags = {
        "multi-latent-attention": True,
        "kv-lora-rank": config["kv_lora_rank"],
        "qk-head-dim": config["qk_nope_head_dim"],
        "qk-pos-emb-head-dim": config["qk_rope_head_dim"],
        "v-head-dim": config["v_head_dim"],
    }
    if config.get("q_lora_rank"):
        flags["q-lora-rank"] = config["q_lora_rank"]
    return flags


def _experts(config: Mapping[str, Any], family: str) -> dict[str, Any]:
    names = ("num_local_experts", "n_routed_experts", "num_experts")
    experts = next((config[name] for name in names if config.get(name)), 0)
    if not experts:
        return {}
    width = config.get("moe_intermediate_size") or config.get("intermediate_size")
    flags = {
        "num-experts": experts,
        "moe-router-topk": config["num_experts_per_tok"],
        "moe-ffn-hidden-size": width,
    }
    shared = config.get("shared_expert_intermediate_size")
    if config.get("n_shared_experts"):
        shared = config["n_shared_experts"] * width
    if shared:
        flags["moe-shared-expert-intermediate-size"] = shared
    dense = config.get("first_k_dense_replace", 0)
    if dense:
        layers = config["num_hidden_layers"]
        flags["moe-layer-freq"] = f"([0]*{dense}+[1]*{layers - dense})"
    return flags
