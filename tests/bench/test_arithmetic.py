# SPDX-License-Identifier: Apache-2.0
"""What is reckoned from measurements: rounds, ratios, rows of ways, layers that fit, options."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_seqpar.bench import cells, options, result
from megatron_seqpar.bench.layers import SHARE, layers_that_fit
from megatron_seqpar.bench.rounds import interleave, median_ratio, spread
from megatron_seqpar.errors import SeqParError

# ---- rounds ---------------------------------------------------------------------------------


def test_rounds_measure_every_way_once_in_turning_order() -> None:
    asked: list[tuple[str, int]] = []

    def measure(name: str, number: int) -> int:
        asked.append((name, number))
        return len(asked)

    found = interleave(["a", "b", "c"], 4, measure)
    assert [name for name, _ in asked] == list("abcbcacababc")
    assert [number for _, number in asked] == [n for n in range(4) for _ in range(3)]
    assert found[1] == {"b": 4, "c": 5, "a": 6}
    assert [list(row) for row in found] == [["a", "b", "c"]] * 4
    assert interleave([], 2, measure) == [{}, {}]


def test_ratio_is_of_the_same_round() -> None:
    """A machine that slows down ten times in the middle does not decide a ratio of two."""
    rounds = [{"a": 1.0, "b": 2.0}, {"a": 10.0, "b": 20.0}, {"a": 10.0, "b": 20.0}]
    assert median_ratio(rounds, "b", "a") == 2.0
    assert median_ratio([*rounds, {"a": 1.0}], "b", "a") == 2.0
    assert median_ratio(rounds, "b", "c") is None
    assert spread([3.0, 1.0, 2.0]) == {
        "seconds": 2.0,
        "seconds_least": 1.0,
        "seconds_most": 3.0,
        "seconds_by_round": [3.0, 1.0, 2.0],
    }


# ---- rows of training ways ------------------------------------------------------------------


def _run(seconds: float, losses: tuple[float, ...] = (5.0, 4.0)) -> dict[str, Any]:
    numbers = dict.fromkeys(cells.MEDIANS, 7.0)
    return {**numbers, "status": "ok", "seconds": seconds, "losses": list(losses)}


def _base(name: str) -> str | None:
    return "one" if name != "one" else None


def test_rows_of_ways() -> None:
    failed = {"status": "oom", "why": "out of memory"}
    measured = {
        "one": [_run(2.0), _run(4.0), _run(8.0)],
        "two": [_run(1.0), _run(3.0, (5.0, 4.4)), _run(4.0)],
        "three": [_run(1.0), failed],
        "none yet": [],
    }
    found = cells.summarized(measured, ["one", "three"], _base)
    assert list(found) == ["one", "two", "three"]
    assert found["one"]["seconds"] == 4.0
    assert found["one"]["time_over"]["one"] == 1.0
    assert found["one"]["largest_loss_difference"] is None
    assert found["two"]["time_over"] == {"one": 0.5, "three": 1.0}  # three ran in round 0 alone
    assert found["two"]["largest_loss_difference"] == pytest.approx(0.1)
    assert found["two"]["losses_compared_with"] == "one"
    assert found["two"]["seconds_by_round"] == [1.0, 3.0, 4.0]
    assert found["three"] == failed


def test_a_way_that_failed_is_not_tried_again() -> None:
    asked: list[tuple[str, int]] = []
    saved: list[int] = []

    def attempt(name: str, number: int) -> dict[str, Any]:
        asked.append((name, number))
        return {"status": "oom", "why": ""} if name == "bad" else _run(1.0)

    found = cells.measure(
        ["good", "bad"], 3, attempt, lambda rows: saved.append(sum(map(len, rows.values())))
    )
    assert asked == [("good", 0), ("bad", 0), ("good", 1), ("good", 2)]
    assert [row["status"] for row in found["bad"]] == ["oom"] * 3
    assert saved == [1, 2, 3, 4, 5, 6]  # after every run


def test_a_loss_that_is_not_a_number_is_far_off() -> None:
    measured = {"one": [_run(1.0)], "two": [_run(1.0, (5.0, float("nan")))]}
    found = cells.summarized(measured, [], _base)
    assert found["two"]["largest_loss_difference"] == float("inf")


# ---- layers that fit ------------------------------------------------------------------------


@given(
    fixed=st.integers(1, 500),
    each=st.integers(1, 100),
    limit=st.integers(1, 5000),
    most=st.integers(1, 80),
    hidden=st.floats(0, 0.3),
)
def test_layers_that_fit(fixed: int, each: int, limit: int, most: int, hidden: float) -> None:
    """Memory grows with layers, and a part of it the peaks do not show."""
    tried: list[int] = []

    def attempt(layers: int) -> tuple[str, int | None]:
        tried.append(layers)
        peak = fixed + each * layers
        return ("ok", peak) if peak * (1 + hidden) <= limit else ("oom", None)

    if (fixed + each) * (1 + hidden) > limit:
        with pytest.raises(SeqParError, match="not one layer fits"):
            layers_that_fit(attempt, most, limit)
        return
    found = layers_that_fit(attempt, most, limit)
    fits = [n for n in range(1, most + 1) if (fixed + each * n) * (1 + hidden) <= limit]
    assert found.layers in fits
    assert found.tries[found.layers][0] == "ok"
    assert len(tried) == len(set(tried)) <= 20
    if hidden == 0:  # what is left free is the share, and no more than a layer beyond it
        assert found.layers == max(fits) or fixed + each * (found.layers + 1) > SHARE * limit


def test_a_failure_that_is_not_about_memory_ends_the_search() -> None:
    with pytest.raises(SeqParError, match="another reason: no such script"):
        layers_that_fit(lambda layers: ("no such script", None), 4, 100)


# ---- options and files ----------------------------------------------------------------------


def test_numbers() -> None:
    assert options.numbers("8K, 4096,1m,8192", "--tokens") == (4096, 8192, 2**20)
    for wrong in ("", "4,", "1.5K", "-4", "K", "0", "4x"):
        with pytest.raises(SeqParError, match="--tokens"):
            options.numbers(wrong, "--tokens")
    with pytest.raises(SeqParError, match="at least 4"):
        options.numbers("2", "--sizes", least=4)


def test_words() -> None:
    assert options.words("a; b;a", "--ways", ("a", "b", "c"), ";") == ["a", "b"]
    with pytest.raises(SeqParError, match="--ways d: use a, b"):
        options.words("a,d", "--ways", ("a", "b"))
    with pytest.raises(SeqParError, match="name at least one of a, b"):
        options.words(" , ", "--ways", ("a", "b"))


def test_a_result_says_what_measured_it(tmp_path: Path) -> None:
    assert result.command(["/x/bin/megatron-seqpar", "bench", "step"]) == (
        "megatron-seqpar bench step"
    )
    assert result.command(["/x/megatron_seqpar/__main__.py", "bench"]) == "megatron-seqpar bench"
    assert result.command(["benchmarks/a.py", "--x", "two words"]) == (
        "python benchmarks/a.py --x 'two words'"
    )
    found = result.describe()
    assert {"command", "cpu", "cores", "memory_gib", "variables"} <= set(found)
    assert {"python", "torch", "megatron-core", "megatron_seqpar"} <= set(found["versions"])
    result.write(found, tmp_path / "new" / "result.json")
    assert json.loads((tmp_path / "new" / "result.json").read_text()) == found
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["result.json"]
    with pytest.raises(SeqParError, match="cannot be written"):
        result.write(found, tmp_path / "new" / "result.json" / "below.json")


def test_memory_of_the_smallest_gpu() -> None:
    gpus = [{"memory": "81559 MiB"}, {"memory": "40960 MiB"}]
    assert result.gpu_memory_bytes({"gpus": gpus}) == 40960 * 2**20
    assert result.gpu_memory_bytes({}) is None


def test_medians_are_medians() -> None:
    values = [5.0, 1.0, 9.0]
    assert spread(values)["seconds"] == statistics.median(values)
