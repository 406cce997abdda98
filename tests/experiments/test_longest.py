# SPDX-License-Identifier: Apache-2.0
"""The search for the longest sequence, against limits that are known."""

from pathlib import Path

import pytest

from megatron_seqpar.compare.config import LongestSection
from megatron_seqpar.compare.longest import capped
from megatron_seqpar.experiments.job import Job
from megatron_seqpar.experiments.longest import OtherFailure, search

OPTIONS = {"start": 512, "unit": 256, "most": 1 << 16, "precision": 0.1}


@pytest.mark.parametrize("limit", [512, 700, 1280, 5632, 40_000])
def test_what_is_found_trains_and_little_more_does(limit):
    found = search(lambda n: ("ok" if n <= limit else "oom", 1.0), **OPTIONS)
    assert found.tokens <= limit < found.tokens * 1.1 + 256
    assert not found.at_least
    assert found.tries[found.tokens] == "ok"
    assert all(length % 256 == 0 for length in found.tries)


def test_nothing_fits():
    found = search(lambda n: ("oom", None), **{**OPTIONS, "start": 256})
    assert (found.tokens, found.at_least) == (0, False)


def test_no_end_is_at_least():
    found = search(lambda n: ("ok", 1.0), **OPTIONS)
    assert (found.tokens, found.at_least) == (1 << 16, True)
    slow = search(lambda n: ("ok" if n < 3000 else "too slow", 1.0), **OPTIONS)
    assert (slow.tokens, slow.at_least) == (2048, True)


def test_another_failure_is_no_limit():
    with pytest.raises(OtherFailure, match="1,024 tokens failed"):
        search(lambda n: ("ok" if n < 1000 else "error", 1.0), **OPTIONS)


def test_memory_is_capped_from_the_start_of_training_on_a_cpu():
    job = Job("a", 2, ("--lr", "1"), Path("train.py"), "cpu", limit_bytes=9)
    section = LongestSection.model_validate({"memory-mib": 64, "seconds": 5})
    words = capped(job, section).command("r.json")
    place = next(i for i, word in enumerate(words) if word.endswith("memory_rank.py"))
    assert Path(words[place]).is_file()
    assert words[place + 1 : place + 6] == ["64", "-", "train.py", "--lr", "1"]
    assert capped(job, section).limit_bytes == 0
    gpu = Job("a", 2, (), Path("train.py"), "cuda")
    assert capped(gpu, section).script == Path("train.py")
