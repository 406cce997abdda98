# SPDX-License-Identifier: Apache-2.0
"""The sizes of a model that decide what it computes and holds, from Megatron's flags."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import SeqParError, UnsupportedError


@dataclass(frozen=True)
class Window:
    """Sliding-window attention: a query sees itself and `size - 1` keys before it.

    `skip` is Megatron's --window-attn-skip-freq: every so manieth layer sees the whole sequence
    (0: none does), or layer by layer whether it has the window.
    """

    size: int
    skip: int | tuple[int, ...] = 0

    def layers(self, count: int) -> int:
        """How many of `count` layers have the window.

        Raises SeqParError where layers are listed and there are not as many.
        """
        if isinstance(self.skip, int):
            return count if self.skip < 1 else count - count // self.skip
        if len(self.skip) != count:
            raise SeqParError(
                f"--window-attn-skip-freq {list(self.skip)}: {count} layers need as many entries"
            )
        return sum(map(bool, self.skip))

    def first(self) -> bool:
        """Whether the first layer has the window."""
        return self.skip != 1 if isinstance(self.skip, int) else bool(self.skip[0])


@dataclass(frozen=True)
class Model:
    """A decoder-only transformer.

    Attributes:
        layers: transformer layers, MTP's not among them.
        hidden: width of the residual stream.
        query_heads, kv_heads: attention heads; equal without GQA.
        head_dim: of queries and keys; `value_head_dim` of values (the same but for MLA).
        attention_parameters: weights of one layer's attention projections.
        ffn: width of a dense layer's MLP.
        gated: SwiGLU and its like, with three matrices in the MLP where others have two.
        vocab: rows of the embedding that tokens can name, unpadded.
        tied: one matrix is embedding and LM head.
        experts: experts of a MoE layer, 0 for a dense model; `experts_per_token` of them are used.
        moe_layers: how many layers are MoE layers.
        expert_ffn, shared_ffn: widths of one expert and of the shared experts together.
        mtp_layers: layers of multi-token prediction.
        window: sliding-window attention, or None.
    """

    layers: int
    hidden: int
    query_heads: int
    kv_heads: int
    head_dim: int
    value_head_dim: int
    attention_parameters: int
    ffn: int
    gated: bool
    vocab: int
    tied: bool = False
    experts: int = 0
    experts_per_token: int = 0
    moe_layers: int = 0
    expert_ffn: int = 0
    shared_ffn: int = 0
    mtp_layers: int = 0
    window: Window | None = None

    @property
    def mlp_matrices(self) -> int:
        """Matrices of one MLP."""
        return 3 if self.gated else 2

    @property
    def embedding_parameters(self) -> int:
        """Weights of the embedding and, untied, of the LM head."""
        return self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        """All weights of matrices (norms and biases, some 0.01%, are not counted)."""
        return self._count(self.experts)

    @property
    def active_parameters(self) -> int:
        """Weights that a token meets: of the experts, those that it is sent to."""
        return self._count(self.experts_per_token)

    def mlp_parameters(self, experts: int) -> int:
        """Weights of a MoE layer's router, shared experts and `experts` of its experts."""
        widths = experts * self.expert_ffn + self.shared_ffn
        return self.hidden * (self.experts + self.mlp_matrices * widths)

    def _count(self, experts: int) -> int:
        dense = self.mlp_matrices * self.hidden * self.ffn
        moe = self.mlp_parameters(experts)
        blocks = self.layers * self.attention_parameters
        blocks += self.moe_layers * moe + (self.layers - self.moe_layers) * dense
        # an MTP layer is a layer of the last kind behind a projection of two hidden vectors to one
        last = moe if self.moe_layers else dense
        mtp = self.attention_parameters + last + 2 * self.hidden**2
        return blocks + self.mtp_layers * mtp + self.embedding_parameters


def read_flags(path: Path, option: str = "--model") -> dict[str, Any]:
    """The flags of a model file, `megatron-flag: value` a line. SeqParError for anything else."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SeqParError(f"{option} {path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SeqParError(f"{option} {path}: not valid YAML: {error}") from error
    if not isinstance(content, dict) or any(
        isinstance(value, (dict, list)) for value in content.values()
    ):
        raise SeqParError(f"{option} {path}: one 'megatron-flag: value' a line is expected")
    return content


def load_model(path: Path) -> Model:
    """The model of a file of flags (configs/models). Raises SeqParError as `model_from_flags`."""
    return model_from_flags(read_flags(path), str(path))


def model_from_flags(flags: Mapping[str, Any], source: str = "the flags") -> Model:
    """The model that Megatron builds from `flags` (names with or without dashes).

    Raises SeqParError where a size is missing and UnsupportedError for a hybrid (Mamba) model,
    whose layers this does not count.
    """
    given = {str(name).replace("_", "-"): value for name, value in flags.items()}
    get = _Reader(given, source)
    if given.get("hybrid-layer-pattern") or given.get("hybrid-override-pattern"):
        raise UnsupportedError(
            "--hybrid-layer-pattern: Mamba layers are not counted; use a GPT model"
        )
    layers, hidden = get.number("num-layers"), get.number("hidden-size")
    heads = get.number("num-attention-heads")
    gated = bool(given.get("swiglu") or given.get("quick-geglu") or given.get("geglu"))
    # Megatron's own defaults, megatron/training/arguments.py
    default_ffn = int(4 * hidden * 2 / 3 / 64) * 64 if given.get("swiglu") else 4 * hidden
    ffn = get.number("ffn-hidden-size", default_ffn)
    kv_heads = heads
    if given.get("group-query-attention") or given.get("num-query-groups"):
        kv_heads = get.number("num-query-groups", 1)
    head_dim = get.number("kv-channels", hidden // heads)
    value_dim = head_dim
    attention = hidden * head_dim * 2 * (heads + kv_heads)
    if given.get("attention-output-gate"):
        attention += hidden * head_dim * heads
    if given.get("multi-latent-attention"):
        head_dim, value_dim, attention = _latent(get, hidden, heads)
        kv_heads = heads
    experts = get.number("num-experts", 0)
    tied = not given.get("untie-embeddings-and-output-weights", False)
    return Model(
        layers=layers,
        hidden=hidden,
        query_heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_head_dim=value_dim,
        attention_parameters=attention,
        ffn=ffn,
        gated=gated,
        vocab=get.number("vocab-size", given.get("padded-vocab-size")),
        tied=tied,
        experts=experts,
        experts_per_token=get.number("moe-router-topk", 2) if experts else 0,
        moe_layers=_moe_layers(given.get("moe-layer-freq"), layers) if experts else 0,
        expert_ffn=get.number("moe-ffn-hidden-size", ffn) if experts else 0,
        shared_ffn=get.number("moe-shared-expert-intermediate-size", 0) if experts else 0,
        mtp_layers=get.number("mtp-num-layers", 0),
        window=_window(given),
    )


@dataclass(frozen=True)
class _Reader:
    """Numbers of the flags, with an error that names the one that is missing or wrong."""

    flags: Mapping[str, Any]
    source: str

    def number(self, name: str, default: Any = None) -> int:
        value = self.flags.get(name)
        value = default if value is None else value
        if value is None:
            raise SeqParError(f"{self.source}: --{name} is not given, and the model needs it")
        try:
            return int(value)
        except (TypeError, ValueError):
            raise SeqParError(
                f"{self.source}: --{name} {value}: a whole number is needed"
            ) from None


def _latent(get: _Reader, hidden: int, heads: int) -> tuple[int, int, int]:
    """Query and value head dim and weights of multi-latent attention (arXiv 2405.04434)."""
    rank = get.number("kv-lora-rank", 32)
    plain, rotated = get.number("qk-head-dim", 128), get.number("qk-pos-emb-head-dim", 64)
    value = get.number("v-head-dim", 128)
    query_rank = get.number("q-lora-rank", 0)
    query = heads * (plain + rotated)
    weights = query_rank * (hidden + query) if query_rank else hidden * query
    weights += hidden * (rank + rotated) + rank * heads * (plain + value) + heads * value * hidden
    return plain + rotated, value, weights


def _moe_layers(frequency: Any, layers: int) -> int:
    """How many layers --moe-layer-freq makes MoE layers: every so manieth, or those listed."""
    if frequency is None:
        return layers
    pattern = _pattern(frequency, "--moe-layer-freq")
    if isinstance(pattern, int):
        return -(-layers // pattern)
    if len(pattern) != layers:
        raise SeqParError(f"--moe-layer-freq {frequency}: {layers} layers need as many entries")
    return sum(pattern)


def _window(given: Mapping[str, Any]) -> Window | None:
    """--window-size "left,right" (keys before a query) with its --window-attn-skip-freq."""
    size = given.get("window-size")
    if size is None:
        return None
    left = int(str(size).strip("()[] ").split(",")[0])
    if left < 0:
        return None
    skip = given.get("window-attn-skip-freq")
    return Window(left + 1, 0 if skip is None else _pattern(skip, "--window-attn-skip-freq"))


def _pattern(value: Any, flag: str) -> int | tuple[int, ...]:
    """A number N (every Nth layer), or 0 and 1 layer by layer: a list, or an expression of lists.

    Megatron evaluates the text as Python; here only sums of `[0, 1] * n` are understood.
    """
    if isinstance(value, int) or str(value).isdigit():
        return int(value)
    if not isinstance(value, str):
        return tuple(int(entry) for entry in value)
    found: list[int] = []
    for term in re.sub(r"\s", "", value).split("+"):
        match = re.fullmatch(r"\(*\[([01](?:,[01])*)\]\)*(?:\*(\d+))?\)*(?:\*(\d+))?", term)
        if match is None:
            raise SeqParError(f"{flag} {value}: not understood")
        times = int(match[2] or 1) * int(match[3] or 1)
        found += [int(digit) for digit in match[1].split(",")] * times
    return tuple(found)
