# SPDX-License-Identifier: Apache-2.0
"""What a kernel backend is, and what it says of itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch


class TileCall(NamedTuple):
    """What a kernel is told besides its tensors.

    Attributes:
        scale: multiplies q k^T.
        causal: the tile is a square on the diagonal; otherwise every pair interacts.
        deterministic: gradients must be bitwise repeatable.
    """

    scale: float
    causal: bool
    deterministic: bool


class Kernel(Protocol):
    """One tile of attention. Shapes (tensors may be strided; the last dim is contiguous):

    q `[b, sq, h, dk]`, k `[b, skv, hkv, dk]`, v `[b, skv, hkv, dv]`, out and dout `[b, sq, h, dv]`,
    lse `[b, h, sq]` in fp32 (fp64 for fp64), natural log; h is a multiple of hkv (GQA).
    """

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: TileCall
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, lse) of the tile alone."""

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        call: TileCall,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(dq, dk, dv) of the tile, given `out` and `lse` over *all* keys of its queries.

        Of `out` a kernel may use only delta = rowsum(dout * out): the executor may pass another
        tensor with the same delta.
        """


@dataclass(frozen=True)
class KernelRecord:
    """A backend's row of the table: what it serves.

    Attributes:
        name: what `kernel=` and `--seqpar-kernel` say.
        module, attribute: where its class lives (imported when chosen), in this package.
        devices, dtypes: served, by name.
        max_head_dim: largest head dim of queries, keys and values.
        head_dim_multiple: what its head dims must divide by; others are padded.
        other_value_dims: pairs (head dim, value dim) with different dims that it serves without
            padding; None for any pair.
        deterministic_head_dim: largest head dim with bitwise repeatable gradients, 0 for none.
        archs: major compute capabilities of the GPUs it serves; empty where that is no matter.
        install: what to install when it is not there.
    """

    name: str
    module: str
    attribute: str
    devices: tuple[str, ...]
    dtypes: tuple[str, ...]
    max_head_dim: int
    head_dim_multiple: int
    other_value_dims: tuple[tuple[int, int], ...] | None
    deterministic_head_dim: int
    archs: tuple[int, ...]
    install: str

    def padded_dim(self, head_dim: int, value_dim: int) -> int | None:
        """Head dim that keys and values must be padded to, or None when served as they are."""
        fit = head_dim % self.head_dim_multiple == value_dim % self.head_dim_multiple == 0
        pairs = self.other_value_dims
        if fit and (head_dim == value_dim or pairs is None or (head_dim, value_dim) in pairs):
            return None
        return -(-max(head_dim, value_dim) // self.head_dim_multiple) * self.head_dim_multiple

    def refuses(
        self, device: str, dtype: str, head_dim: int, value_dim: int, deterministic: bool
    ) -> str | None:
        """Why this backend cannot serve such a call, or None."""
        if device not in self.devices:
            return f"serves {', '.join(self.devices)} tensors, not {device}"
        if dtype not in self.dtypes:
            return f"serves {', '.join(self.dtypes)}, not {dtype}"
        padded = self.padded_dim(head_dim, value_dim)
        used = padded or max(head_dim, value_dim)
        listed = padded is None and head_dim != value_dim
        if used > self.max_head_dim and not listed:
            return f"serves head dims to {self.max_head_dim}, not {max(head_dim, value_dim)}"
        if deterministic and used > self.deterministic_head_dim:
            if not self.deterministic_head_dim:
                return "has no deterministic backward"
            return f"is deterministic for head dims to {self.deterministic_head_dim}, not {used}"
        return None
