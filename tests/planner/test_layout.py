# SPDX-License-Identifier: Apache-2.0
"""A layout that cannot be is refused, with the constraint that it breaks."""

from __future__ import annotations

import pytest

from megatron_seqpar.errors import UnsupportedError
from megatron_seqpar.planner import Layout, estimate

from .models import cluster, model


@pytest.mark.parametrize(
    ("name", "settings", "text"),
    [
        ("llama2-33-heads", {"tp": 2}, "tp=2 does not divide 33 heads"),
        ("llama3-8b", {"tp": 16}, None),
        ("llama3-8b", {"pp": 3}, "pp=3 x vpp=1 does not divide 32 layers"),
        ("llama3-8b", {"dp": 3}, "does not divide the global batch"),
        ("llama3-8b", {"vpp": 2}, "vpp=2 needs pp >= 2"),
        ("llama3-8b", {"sp": 3}, "sp=3 does not divide 8192 tokens"),
        ("llama3-8b", {"ep": 2, "dp": 2}, "the model has no experts"),
        ("mixtral-8x7b", {"ep": 3, "dp": 3, "global_batch": 66}, "ep=3 does not divide 8 experts"),
        ("mixtral-8x7b", {"tp": 2}, "tp=2 with experts needs TP-SP"),
        ("mixtral-8x7b", {"mlp_chunks": 4}, "every layer is a mixture of experts"),
        ("llama3-8b", {"zero": 3, "sp": 2}, "Megatron FSDP"),
        ("llama3-8b", {"recompute": "some"}, "recompute=some: use one of none"),
        ("llama3-8b", {"dp": 0}, "dp=0: use 1 or more"),
    ],
)
def test_the_constraint_is_named(name: str, settings: dict[str, object], text: str | None) -> None:
    layout = Layout(**{"sequence_length": 8192, "global_batch": 64, **settings})  # type: ignore[arg-type]
    if text is None:
        estimate(model(name), cluster(), layout)
        return
    with pytest.raises(UnsupportedError, match=text.replace("(", r"\(")):
        estimate(model(name), cluster(), layout)


def test_uneven_stages_give_the_earlier_ones_more() -> None:
    layout = Layout(2048, 64, pp=8, uneven=True)
    assert layout.stage_layers(60) == (8, 8, 8, 8, 7, 7, 7, 7)
