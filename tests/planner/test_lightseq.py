# SPDX-License-Identifier: Apache-2.0
"""DISTFLASHATTN's published times, simulated."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from megatron_seqpar.commands.plan import plan
from megatron_seqpar.planner import Basis
from megatron_seqpar.planner.lightseq import (
    FITTED,
    anchors,
    fit_anchors,
    named_model,
    padded,
    simulate_cell,
    table,
)
from megatron_seqpar.planner.lightseq_cells import ANCHORS, Method

from .models import cluster


@pytest.mark.parametrize("index", range(len(ANCHORS)))
def test_calibration_cells_are_within_5_percent(index: int) -> None:
    [cell] = anchors(cluster("lightseq"), ANCHORS[index : index + 1])
    assert cell.error is not None
    assert abs(cell.error) < 0.05


def test_the_constants_are_the_fit_to_these_cells_and_nothing_else() -> None:
    """Whoever changes a cell or the model has to write the file again."""
    fitted = fit_anchors(cluster("lightseq"))
    for name in FITTED:
        known = getattr(cluster("lightseq").constants, name)
        assert getattr(fitted.constants, name) == pytest.approx(known, rel=0.01)
        assert cluster("lightseq").origin(name).basis is Basis.CALIBRATED
    assert cluster("lightseq").origin("layer_overhead").basis is Basis.ASSUMED


def test_one_shared_adapter_cannot_give_the_published_ulysses() -> None:
    """Why the file says eight adapters a node."""
    shared = fit_anchors(cluster("dgx-a100-100g"))
    worst = max(abs(cell.error or 0.0) for cell in anchors(shared))
    assert worst > 0.2


def test_a_left_out_length_is_predicted() -> None:
    """Fitted to 64K and 256K alone, the cells of 128K are within 6%."""
    rest = [cell for cell in ANCHORS if cell.thousands != 128]
    fitted = fit_anchors(cluster("lightseq"), rest)
    for cell in anchors(fitted, [cell for cell in ANCHORS if cell.thousands == 128]):
        assert abs(cell.error or 0.0) < 0.06


def test_ours_is_faster_than_what_is_published() -> None:
    """No rank idles in the last step of an even number."""
    cells = {
        (c.model, c.ranks, c.thousands, c.method): c.time.total for c in table(cluster("lightseq"))
    }
    for (name, ranks, thousands, method), seconds in cells.items():
        if method is Method.DISTFLASHATTN:
            assert cells[name, ranks, thousands, Method.OURS] < seconds
        if method is Method.FULL:  # attention runs a second time
            assert cells[name, ranks, thousands, Method.DISTFLASHATTN] < seconds


def test_heads_that_do_not_divide_are_padded_for_those_that_split_heads() -> None:
    model = named_model("llama2-33-heads")
    assert padded(model, Method.MEGATRON, 8).query_heads == 40
    assert padded(model, Method.DISTFLASHATTN, 8) is model
    megatron = simulate_cell(cluster("lightseq"), "llama2-33-heads", 8, 256, Method.MEGATRON)
    even = simulate_cell(cluster("lightseq"), "llama2-7b", 8, 256, Method.MEGATRON)
    assert megatron.attention / even.attention == pytest.approx(40 / 32, rel=0.02)


def test_the_command_prints_predicted_beside_published() -> None:
    done = CliRunner().invoke(plan, ["reproduce", "lightseq"])
    assert done.exit_code == 0, done.output
    for text in ("published", "predicted", "76.38", "dgx-b200", "4 calibrated"):
        assert text in done.output
