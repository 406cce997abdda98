# SPDX-License-Identifier: Apache-2.0
"""The picture shows every way's longest sequence, and says where there is none."""

from pathlib import Path
from typing import Any

import pytest

from megatron_seqpar.compare import plot

pytest.importorskip("matplotlib")

ROW = {
    "status": "ok",
    "losses": [2.0, 1.0],
    "seconds": [1.0, 1.1],
    "step_time_s": 1.05,
    "memory_since_start_bytes": 2**20,
    "bytes_sent_per_step": 0,
    "changes": {},
}
ROWS = [{**ROW, "label": "SP=1", "reference": True}, {**ROW, "label": "SP=2", "reference": False}]
LONGEST = {
    "SP=1": {"tokens": 1024, "at_least": False, "why": ""},
    "SP=2": {"tokens": 4096, "at_least": True, "why": ""},
    "CP=2": {"tokens": None, "at_least": False, "why": "needs Transformer Engine"},
}


@pytest.mark.parametrize("longest", [None, LONGEST])
def test_panels(longest: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    save = plot.save_picture

    def keep(figure: Any, path: Path) -> None:
        drawn.extend(figure.axes)
        save(figure, path)

    monkeypatch.setattr(plot, "save_picture", keep)
    plot.plot({"64": ROWS, "128": ROWS}, "title", tmp_path / "x.png", longest, "1 MiB")
    assert (tmp_path / "x.png").stat().st_size > 10_000
    assert len(drawn) == 10 + (longest is not None)
    if longest is not None:
        told = [text.get_text().strip() for text in drawn[-1].texts]
        assert told == ["1,024", ">= 4,096", "needs Transformer Engine"]
        assert [bar.get_width() for bar in drawn[-1].patches] == [1024, 4096]
