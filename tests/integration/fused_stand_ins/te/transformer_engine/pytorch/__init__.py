# SPDX-License-Identifier: Apache-2.0
"""The modules of Transformer Engine that stock layer specs are made of, in plain torch.

`calls` counts their forward passes by class.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from . import distributed, fp8, ops, tensor

__all__ = [
    "DotProductAttention",
    "GroupedLinear",
    "LayerNorm",
    "LayerNormLinear",
    "Linear",
    "RMSNorm",
    "calls",
    "distributed",
    "fp8",
    "ops",
    "tensor",
]
calls: Counter[str] = Counter()


def _normalized(
    kind: str, hidden: torch.Tensor, weight: torch.Tensor, bias: Any, eps: float, centred: bool
) -> torch.Tensor:
    gamma = weight + 1 if centred else weight
    if kind == "RMSNorm":
        return torch.nn.functional.rms_norm(hidden, weight.shape, gamma, eps)
    return torch.nn.functional.layer_norm(hidden, weight.shape, gamma, bias, eps)


class _Norm(torch.nn.Module):
    def __init__(
        self,
        normalized_shape: int | None = None,
        eps: float = 1e-5,
        sequence_parallel: bool = False,
        params_dtype: Any = None,
        zero_centered_gamma: bool = False,
        device: Any = "cuda",
        hidden_size: int | None = None,
    ) -> None:
        super().__init__()
        normalized_shape = hidden_size if normalized_shape is None else normalized_shape
        assert normalized_shape is not None
        self.eps, self.zero_centered_gamma = eps, zero_centered_gamma
        start = torch.zeros if zero_centered_gamma else torch.ones
        self.weight = torch.nn.Parameter(start(normalized_shape, dtype=params_dtype, device=device))
        self.weight.sequence_parallel = sequence_parallel
        self.bias = None
        if type(self).__name__ != "RMSNorm":
            zeros = torch.zeros(normalized_shape, dtype=params_dtype, device=device)
            self.bias = torch.nn.Parameter(zeros)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        calls[type(self).__name__] += 1
        kind, centred = type(self).__name__, self.zero_centered_gamma
        return _normalized(kind, hidden, self.weight, self.bias, self.eps, centred)


class LayerNorm(_Norm):
    """LayerNorm with weight and bias."""


class RMSNorm(_Norm):
    """RMSNorm with a weight."""


class Linear(torch.nn.Module):
    """x W^T + b on one tensor-parallel rank; the bias may be returned in place of added."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        init_method: Any = None,
        return_bias: bool = False,
        parallel_mode: Any = None,
        params_dtype: Any = None,
        device: Any = "cuda",
        tp_size: int = 1,
        **unused: Any,
    ) -> None:
        super().__init__()
        assert tp_size == 1, "this stand-in knows no tensor parallelism"
        self.in_features, self.out_features, self.use_bias = in_features, out_features, bias
        self.return_bias, self.parallel_mode = return_bias, parallel_mode
        empty = torch.empty(out_features, in_features, dtype=params_dtype, device=device)
        self.weight = torch.nn.Parameter(empty)
        if init_method is not None:
            init_method(self.weight)
        self.bias = None
        if bias:
            zeros = torch.zeros(out_features, dtype=params_dtype, device=device)
            self.bias = torch.nn.Parameter(zeros)

    def forward(self, hidden: torch.Tensor, is_first_microbatch: Any = None) -> Any:
        calls[type(self).__name__] += 1
        if self.return_bias:
            return torch.nn.functional.linear(hidden, self.weight), self.bias
        return torch.nn.functional.linear(hidden, self.weight, self.bias)


class LayerNormLinear(Linear):
    """A norm and a linear layer as one module, whose norm's output nobody sees."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        normalization: str = "LayerNorm",
        zero_centered_gamma: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(in_features, out_features, **options)
        self.eps, self.normalization = eps, normalization
        self.zero_centered_gamma = zero_centered_gamma
        place = {"dtype": self.weight.dtype, "device": self.weight.device}
        start = torch.zeros if zero_centered_gamma else torch.ones
        self.layer_norm_weight = torch.nn.Parameter(start(in_features, **place))
        self.layer_norm_bias = None
        if normalization == "LayerNorm":
            self.layer_norm_bias = torch.nn.Parameter(torch.zeros(in_features, **place))

    def forward(self, hidden: torch.Tensor, is_first_microbatch: Any = None) -> Any:
        normalized = _normalized(
            self.normalization, hidden, self.layer_norm_weight, self.layer_norm_bias, self.eps,
            self.zero_centered_gamma,
        )  # fmt: skip
        return super().forward(normalized, is_first_microbatch)


class GroupedLinear(torch.nn.Module):
    """Linear layers of experts; Megatron derives a class from it at import."""


class DotProductAttention(torch.nn.Module):
    """The core attention that must not be built where the axis is on."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
