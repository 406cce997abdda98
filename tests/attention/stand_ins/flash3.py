# SPDX-License-Identifier: Apache-2.0
"""flash_attn_3: its operators, defined with the schemas of its source, here for CPU tensors."""

from __future__ import annotations

from typing import Any

import torch

from . import arithmetic

FORWARD = (
    "fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new = None, "
    "Tensor(v_new!)? v_new = None, Tensor? q_v = None, Tensor(out!)? out = None, "
    "Tensor? cu_seqlens_q = None, Tensor? cu_seqlens_k = None, Tensor? cu_seqlens_k_new = None, "
    "Tensor? seqused_q = None, Tensor? seqused_k = None, int? max_seqlen_q = None, "
    "int? max_seqlen_k = None, Tensor? page_table = None, Tensor? kv_batch_idx = None, "
    "Tensor? leftpad_k = None, Tensor? rotary_cos = None, Tensor? rotary_sin = None, "
    "Tensor? seqlens_rotary = None, Tensor? q_descale = None, Tensor? k_descale = None, "
    "Tensor? v_descale = None, float? softmax_scale = None, bool is_causal = False, "
    "int window_size_left = -1, int window_size_right = -1, int attention_chunk = 0, "
    "float softcap = 0.0, bool is_rotary_interleaved = False, "
    "Tensor? scheduler_metadata = None, int num_splits = 0, bool? pack_gqa = None, "
    "int sm_margin = 0) -> (Tensor(out!), Tensor, Tensor, Tensor)"
)
_BACKWARD_ARGUMENTS = (
    "Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, "
    "Tensor(dq!)? dq = None, Tensor(dk!)? dk = None, Tensor(dv!)? dv = None, "
    "Tensor? cu_seqlens_q = None, Tensor? cu_seqlens_k = None, Tensor? seqused_q = None, "
    "Tensor? seqused_k = None, int? max_seqlen_q = None, int? max_seqlen_k = None, "
    "float? softmax_scale = None, bool is_causal = False, int window_size_left = -1, "
    "int window_size_right = -1, float softcap = 0.0, bool deterministic = False, "
    "int sm_margin = 0"
)
BACKWARD = f"bwd({_BACKWARD_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
# builds of 2025 return the gradients as well
OLDER_BACKWARD = (
    f"bwd({_BACKWARD_ARGUMENTS}) -> (Tensor(dq!), Tensor(dk!), Tensor(dv!), Tensor, Tensor, "
    "Tensor, Tensor, Tensor)"
)

deterministic_calls: list[bool] = []


def _asked(q: torch.Tensor, k: torch.Tensor, named: dict[str, Any]) -> arithmetic.Asked:
    return arithmetic.flash3(
        named["softmax_scale"], named["is_causal"], named["window_size_left"],
        named["window_size_right"], named["softcap"], q.shape[1], k.shape[1],
    )  # fmt: skip


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **named: Any
) -> tuple[torch.Tensor, ...]:
    assert named["num_splits"] == 1
    out, lse = arithmetic.forward(q, k, v, _asked(q, k, named))
    return out, lse, q.new_empty(0), q.new_empty(0)


def _backward(*tensors: torch.Tensor, **named: Any) -> tuple[torch.Tensor, ...]:
    dout, q, k, v, out, lse, *grads = tensors
    deterministic_calls.append(bool(named["deterministic"]))
    arithmetic.write(
        arithmetic.backward(dout, q, k, v, out, lse, _asked(q, k, named)), tuple(grads)
    )
    return tuple(q.new_empty(0) for _ in range(5))


def _named(
    schema: str, arguments: tuple[object, ...], given: dict[str, object]
) -> dict[str, object]:
    """Every argument by name, defaults included."""
    parsed = torch._C.parse_schema("stand_in::" + schema)
    values = {a.name: a.default_value for a in parsed.arguments if a.has_default_value()}
    values.update(zip((a.name for a in parsed.arguments), arguments, strict=False))
    return {**values, **given}


def register(namespace: str, backward_schema: str = BACKWARD) -> torch.library.Library:
    """Define the operators in `namespace`; they go when the library object goes."""
    library = torch.library.Library(namespace, "FRAGMENT")
    library.define(FORWARD)
    library.define(backward_schema)

    def forward(*arguments: object, **given: object) -> tuple[torch.Tensor, ...]:
        named = _named(FORWARD, arguments, given)
        tensors = [named.pop(name) for name in "qkv"]
        return _forward(*tensors, **named)  # type: ignore[arg-type]

    def backward(*arguments: object, **given: object) -> tuple[torch.Tensor, ...]:
        named = _named(backward_schema, arguments, given)
        first = ("dout", "q", "k", "v", "out", "softmax_lse", "dq", "dk", "dv")
        tensors = [named.pop(name) for name in first]
        return _backward(*tensors, **named)  # type: ignore[arg-type]

    library.impl("fwd", forward, "CPU")
    library.impl("bwd", backward, "CPU")
    return library
