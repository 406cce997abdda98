# SPDX-License-Identifier: Apache-2.0
"""What a rank can compute on: its own tokens and what arrived, found by token range.

A tile may need a part of what arrived, or several parts of several owners; `Operands.get` returns
one tensor for any range that is there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator

import torch

from .ir import Key, Payload
from .layouts import Span, TokenLayout

Tensors = tuple[torch.Tensor, ...]
# (a slice of the local token dim, head range) -> this rank's own tensors of a payload
OwnTensors = Callable[[slice, slice], Tensors]

# token dim of each tensor of a payload; all others have it at 1
_TOKEN_DIMS = {Payload.Q_GRAD: (1, 1, 3)}


class Operands:
    """Local and received operands of one rank during one pass.

    Args:
        layout, rank: who owns what, and who this is.
        own: per payload, how to take this rank's own tensors.
    """

    def __init__(self, layout: TokenLayout, rank: int, own: dict[Payload, OwnTensors]) -> None:
        self.layout, self.rank, self.own = layout, rank, own
        self.held: dict[tuple[Payload, Span], dict[Span, Tensors]] = defaultdict(dict)
        # joined ranges are used again and again by the tiles of a step and of the next ones
        self._joined: dict[Key, Tensors] = {}

    def put(self, key: Key, tensors: Tensors) -> None:
        """Keep what arrived."""
        payload, span, heads = key
        self.held[payload, heads][span] = tensors

    def free(self, key: Key) -> None:
        """Drop what arrived, and what was joined from it."""
        payload, span, heads = key
        del self.held[payload, heads][span]
        for joined in [
            other
            for other in self._joined
            if other[0] is payload and other[2] == heads and other[1].meet(span).size > 0
        ]:
            del self._joined[joined]

    def get(self, payload: Payload, span: Span, heads: Span) -> Tensors:
        """The tensors of a payload for a token range and a head range of its own heads."""
        key = payload, span, heads
        if key in self._joined:
            return self._joined[key]
        parts = list(self._parts(payload, span, heads))
        if len(parts) == 1:
            return parts[0]
        dims = _TOKEN_DIMS.get(payload, (1,) * len(parts[0]))
        by_tensor = zip(zip(*parts, strict=True), dims, strict=True)
        joined = tuple(torch.cat(pieces, dim) for pieces, dim in by_tensor)
        self._joined[key] = joined
        # what arrived is now held twice: let its buffers go
        held = self.held[payload, heads]
        for there in [part for part in held if part.meet(span) == part]:
            held[there] = _narrow(payload, joined, there.within(span), span.size)
        return joined

    def _parts(self, payload: Payload, span: Span, heads: Span) -> Iterator[Tensors]:
        held = sorted(self.held[payload, heads].items())
        for at, is_own in self._by_owner(span):
            if is_own:
                for local in self.local(at):
                    yield self.own[payload](local, slice(*heads))
                continue
            for there, tensors in held:
                part = there.meet(at)
                if part.size > 0:
                    yield _narrow(payload, tensors, part.within(there), there.size)

    def _by_owner(self, span: Span) -> Iterator[tuple[Span, bool]]:
        """`span` in maximal parts that are this rank's own, or not."""
        start, own = span.start, False
        for owner, part in self.layout.split(span):
            if (owner == self.rank) != own:
                if part.start > start:
                    yield Span(start, part.start), own
                start, own = part.start, owner == self.rank
        yield Span(start, span.stop), own

    def local(self, span: Span) -> list[slice]:
        """Where a range of this rank's own tokens lies in its local tensor, in as few slices."""
        slices: list[slice] = []
        for _, part in self.layout.split(span):
            at = self.layout.local(self.rank, part)
            if slices and slices[-1].stop == at.start:
                slices[-1] = slice(slices[-1].start, at.stop)
            else:
                slices.append(at)
        return slices


def _narrow(payload: Payload, tensors: Tensors, at: slice, size: int) -> Tensors:
    if at.start == 0 and at.stop == size:
        return tensors
    dims = _TOKEN_DIMS.get(payload, (1,) * len(tensors))
    return tuple(
        tensor.narrow(dim, at.start, at.stop - at.start)
        for tensor, dim in zip(tensors, dims, strict=True)
    )
