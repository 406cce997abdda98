# SPDX-License-Identifier: Apache-2.0
"""Run a pretraining script with textbook attention in the place of Megatron's local attention.

    megatron-seqpar run --nproc 1 tests/integration/plain_attention.py OPTIONS SCRIPT ARGS

OPTIONS is a JSON object with any of `window` [left, right], `everything` N (every N-th layer has
no window), `sinks`, `prefix`, `softcap`. It is the reference for what stock Megatron cannot do on a
CPU (latent attention) or not at all (prefix masks, sink tokens, bounded logits), and shares no code
with the package: one dense matrix of which token sees which, and one softmax.
"""

from __future__ import annotations

import json
import math
import runpy
import sys
from pathlib import Path
from typing import Any

import torch


def of_layer(options: dict[str, Any], number: int) -> dict[str, Any]:
    """The options of one layer, counted from 1."""
    if number % options.get("everything", number + 1) == 0:
        return {name: value for name, value in options.items() if name != "window"}
    return options


def visible(length: int, options: dict[str, Any]) -> torch.Tensor:
    """`[s, s]`, True where query i (row) sees key j (column)."""
    i, j = torch.arange(length)[:, None], torch.arange(length)[None, :]
    seen = j <= i
    if "window" in options:
        left, right = options["window"]
        seen = (j >= i - left) & (j <= i + right)
        seen |= (j < options.get("sinks", 0)) & (j <= i)
    if "prefix" in options:
        seen |= j < options["prefix"]
    return seen


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    options: dict[str, Any],
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """query `[s, b, h, d]`, key and value `[s, b, h_kv, d]` -> `[s, b, h * d_v]`.

    attention_mask: Megatron's, `[b, 1, s, s]`, True where a key is hidden whatever the options say.
    """
    share = query.shape[2] // key.shape[2]
    key, value = (tensor.repeat_interleave(share, dim=2) for tensor in (key, value))
    scores = torch.einsum("ibhd,jbhd->bhij", query, key) * scale
    cap = options.get("softcap")
    if cap:
        scores = cap * torch.tanh(scores / cap)
    hidden = ~visible(len(query), options)
    if attention_mask is not None:
        hidden = hidden | attention_mask
    probabilities = scores.masked_fill(hidden, -math.inf).softmax(dim=-1)
    return torch.einsum("bhij,jbhd->ibhd", probabilities, value).flatten(2)


def install(options: dict[str, Any]) -> None:
    """Replace the local attention, keeping its name, which layer specs refer to."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.module import MegatronModule

    def __init__(self: Any, config: Any, layer_number: int, *args: Any, **kwargs: Any) -> None:
        MegatronModule.__init__(self, config=config)
        self.options = of_layer(options, layer_number)
        scale = kwargs.get("softmax_scale")
        self.scale = config.kv_channels**-0.5 if scale is None else scale

    def forward(
        self: Any, query: Any, key: Any, value: Any, mask: Any, *args: Any, **kwargs: Any
    ) -> Any:
        return attend(query, key, value, self.scale, self.options, mask)

    DotProductAttention.__init__ = __init__
    DotProductAttention.forward = forward


if __name__ == "__main__":
    options, script, *rest = sys.argv[1:]
    install(json.loads(options))
    sys.argv = [script, *rest]
    sys.path.insert(0, str(Path(script).absolute().parent))
    runpy.run_path(script, run_name="__main__")
