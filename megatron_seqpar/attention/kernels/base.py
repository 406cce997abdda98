# SPDX-License-Identifier: Apache-2.0
"""What a kernel backend is, and what it says of itself."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol

import torch


class TileCall(NamedTuple):
    """What a kernel is told besides its tensors.

    Query row i of the tile sees its key column j when `low <= j - i <= high`, both counted from the
    tile's own start. Every row and every column has a pair: a tile is trimmed to what interacts.

    Attributes:
        scale: multiplies q k^T.
        low, high: the band of diagonals; None where that side is not cut.
        softcap: c > 0 replaces a scaled score x by c tanh(x / c) (Gemma 2, arXiv 2408.00118);
            0 for none.
        deterministic: gradients must be bitwise repeatable.
    """

    scale: float
    low: int | None = None
    high: int | None = None
    softcap: float = 0.0
    deterministic: bool = False

    @property
    def full(self) -> bool:
        """Every pair interacts."""
        return self.low is None and self.high is None

    def causal_square(self, sq: int, skv: int) -> bool:
        """The tile of `sq` queries and `skv` keys is a square cut along its diagonal."""
        return sq == skv and self.low is None and self.high == 0

    def windows(self, sq: int, skv: int) -> tuple[int, int]:
        """(left, right) as FlashAttention counts them; -1 where there is no limit.

        There the diagonal ends in the last query and the last key, and query i sees the keys
        `i + skv - sq - left <= j <= i + skv - sq + right`.
        """
        left = -1 if self.low is None else skv - sq - self.low
        right = -1 if self.high is None else self.high - (skv - sq)
        return left, right

    def causal_or_windows(self, sq: int, skv: int) -> tuple[bool, int, int]:
        """(causal, left, right) for kernels that take both a flag and windows."""
        if self.causal_square(sq, skv):
            return True, -1, -1
        return False, *self.windows(sq, skv)


class Kernel(Protocol):
    """One tile of attention. Shapes (tensors may be strided; the last dim is contiguous):

    q `[b, sq, h, dk]`, k `[b, skv, hkv, dk]`, v `[b, skv, hkv, dv]`, out and dout `[b, sq, h, dv]`,
    lse `[b, h, sq]` in fp32 (fp64 for fp64), natural log; h is a multiple of hkv (GQA).

    What `registry.select` returns serves every band; the class of a backend may serve only those
    that its record names.
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


class Bands(Enum):
    """Which bands of diagonals a backend serves by itself; `bands.py` cuts up the others."""

    ALL = "all"
    NOT_TALL = "not tall"  # see `bands.not_tall`
    NONE = "none"  # only what is full, and causal squares


class Wanted(NamedTuple):
    """What a backend is chosen for; devices and dtypes by name."""

    device: str
    dtype: str
    head_dim: int
    value_dim: int
    deterministic: bool = False
    softcap: bool = False


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
        bands: which bands it serves without being called several times a tile.
        softcap: whether it caps scores (`TileCall.softcap`), in both passes.
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
    bands: Bands
    softcap: bool
    archs: tuple[int, ...]
    install: str

    def padded_dim(self, head_dim: int, value_dim: int) -> int | None:
        """Head dim that keys and values must be padded to, or None when served as they are."""
        fit = head_dim % self.head_dim_multiple == value_dim % self.head_dim_multiple == 0
        pairs = self.other_value_dims
        if fit and (head_dim == value_dim or pairs is None or (head_dim, value_dim) in pairs):
            return None
        return -(-max(head_dim, value_dim) // self.head_dim_multiple) * self.head_dim_multiple

    def refuses(self, wanted: Wanted) -> str | None:
        """Why this backend cannot serve such calls, or None."""
        device, dtype, head_dim, value_dim, deterministic, softcap = wanted
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
        if softcap and not self.softcap:
            return "has no logit soft-cap"
        return None
