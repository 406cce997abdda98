# SPDX-License-Identifier: Apache-2.0
"""What the pages on adding a schedule and a kernel add is added here, and their tests run."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_seqpar.attention import ThreadTransport, dist_flash_attention, kernels, schedules
from megatron_seqpar.attention.kernels import registry
from megatron_seqpar.attention.kernels.base import Bands, KernelRecord
from megatron_seqpar.errors import KernelError, ScheduleError
from tests.docs.pages import DOCS, blocks

SCHEDULE = blocks(DOCS / "add-schedule.md")
KERNEL = blocks(DOCS / "add-kernel.md")


def test_the_pages_have_the_blocks() -> None:
    assert (len(SCHEDULE), len(KERNEL)) == (4, 4)


def added(package: Any, name: str, code: str, folder: Path, patch: pytest.MonkeyPatch) -> Any:
    """A module of `package` made from a page's block, for one test."""
    (folder / f"{name}.py").write_text(code, encoding="utf-8")
    patch.setattr(package, "__path__", [*package.__path__, str(folder)])
    patch.setattr(package, name, None, raising=False)  # taken away again, with the module
    patch.delitem(sys.modules, f"{package.__name__}.{name}", raising=False)
    return importlib.import_module(f"{package.__name__}.{name}")


def page_tests(code: str, file: str) -> Iterator[Callable[..., None]]:
    """The test functions of a block; parametrized ones with each of their values."""
    names: dict[str, Any] = {}
    exec(compile(code, file, "exec"), names)
    for name, function in names.items():
        if not name.startswith("test_"):
            continue
        calls: list[dict[str, Any]] = [{}]
        for mark in getattr(function, "pytestmark", []):
            argument, values = mark.args
            calls = [{**call, argument: value} for call in calls for value in values]
        for call in calls:
            yield lambda function=function, call=call: function(**call)


@pytest.fixture
def fold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    module = added(schedules, "fold", SCHEDULE[0], tmp_path, monkeypatch)
    entry = eval(f"{{{SCHEDULE[1]}}}", {"fold": module})
    assert entry == {"fold": module.place}
    monkeypatch.setitem(schedules.BUILDERS, "fold", module.place)
    caches = schedules._built, schedules._chosen
    for cache in caches:
        cache.cache_clear()
    yield
    sys.modules.pop(module.__name__, None)
    for cache in caches:
        cache.cache_clear()


@pytest.mark.usefixtures("fold")
def test_the_schedule_of_the_page() -> None:
    ran = [run() for code in SCHEDULE[2:] for run in page_tests(code, "add-schedule.md")]
    assert len(ran) == 3


@pytest.mark.usefixtures("fold")
def test_what_the_schedule_does_not_serve() -> None:
    with pytest.raises(ScheduleError, match="causal on 4: use balanced or auto"):
        schedules.build_schedule("fold", size=4, seq_length=64)
    with pytest.raises(ScheduleError, match="full on 5: use balanced or auto"):
        schedules.build_schedule("fold", size=5, seq_length=65, mask="full")
    assert "fold" in schedules.names()


@pytest.mark.usefixtures("fold")
def test_the_drawing_in_the_docstring_is_the_schedule() -> None:
    """Letter pairs 'step:rank' of the drawing, against the placed tiles."""
    drawing = inspect.getdoc(schedules.fold) or ""
    plan = schedules.build_schedule("fold", size=5, seq_length=50)
    placed = {
        (tile.q.start // 10, tile.kv.start // 10): f"{step}:{rank}"
        for rank in range(5)
        for step, one in enumerate(plan.steps(rank))
        for tile in one.tiles
    }
    rows = [line.split() for line in drawing.splitlines() if line.strip().startswith("q ")]
    drawn = {
        (row, column): pair
        for row, words in enumerate(rows)
        for column, pair in enumerate(word for word in words if ":" in word)
    }
    assert drawn == placed


@pytest.fixture
def eager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    module = added(kernels, "eager", KERNEL[0], tmp_path, monkeypatch)
    row = eval(KERNEL[1], {"KernelRecord": KernelRecord, "Bands": Bands})
    table = (*registry.KERNELS, row)
    monkeypatch.setattr(registry, "KERNELS", table)
    monkeypatch.setattr(registry, "_BY_NAME", {record.name: record for record in table})
    registry._select.cache_clear()
    yield
    sys.modules.pop(module.__name__, None)
    registry._select.cache_clear()


@pytest.mark.usefixtures("eager")
def test_the_kernel_of_the_page() -> None:
    ran = [run() for run in page_tests("\n".join(KERNEL[2:]), "add-kernel.md")]
    assert len(ran) == 3 * 2 + 1


@pytest.mark.usefixtures("eager")
def test_what_the_kernel_does_not_serve() -> None:
    import torch

    q = torch.zeros(1, 4, 1, 8, dtype=torch.float64)
    with pytest.raises(KernelError, match="kernel='eager': serves float32, bfloat16, float16"):
        ThreadTransport.run(
            1, lambda group: dist_flash_attention(q, q, q, group=group, kernel="eager")
        )
