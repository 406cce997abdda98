# SPDX-License-Identifier: Apache-2.0
"""The table of releases, and that the patch points speak of the same ones."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from megatron_seqpar import compatibility
from megatron_seqpar.compatibility import ENVIRONMENTS, FAMILIES, RELEASES

ROOT = Path(__file__).parents[2]


def points():
    pytest.importorskip("megatron.core")
    from megatron_seqpar.integration.patch_points import PATCH_POINTS

    return PATCH_POINTS


def test_patch_points_know_these_families_and_no_others():
    assert {family for point in points() for family in point.versions} == set(FAMILIES)
    for point in points():
        assert point.versions == tuple(sorted(point.versions, key=compatibility.numbers)), point


def test_one_point_a_symbol_and_family():
    for one, other in itertools.combinations(points(), 2):
        if one.symbol == other.symbol:
            assert not set(one.versions) & set(other.versions), one.symbol


def test_every_family_has_a_point_for_each_part():
    """What must be replaced on every release, by whatever name it goes there."""
    parts = ("batch", "roll_tensor", "process_mtp_loss|_postprocess", "__init__", "calc_loss")
    for family in FAMILIES:
        mine = [point.symbol for point in points() if family in point.versions]
        for part in parts:
            assert any(re.search(part, symbol) for symbol in mine), (family, part)


@pytest.mark.parametrize(
    ("version", "known", "nearest"),
    [
        ("0.19.2", True, "0.19.2"),
        ("0.17.0", True, "0.17.1"),
        ("0.19.0rc3", True, "0.19.2"),
        ("0.18.2+abc.0", True, "0.18.2"),
        ("0.15.3", False, "0.16.1"),
        ("0.20.0", False, "0.19.2"),
        ("1.0.0", False, "0.19.2"),
    ],
)
def test_versions_that_were_run_and_the_nearest_to_others(version, known, nearest):
    assert compatibility.is_known(version) is known
    assert compatibility.nearest(version).version == nearest


def test_since_and_before_divide_the_families():
    assert compatibility.since("0.18") == ("0.18", "0.19")
    assert compatibility.before("0.18") == ("0.16", "0.17")
    assert compatibility.since("0.16") == FAMILIES
    assert compatibility.before("0.16") == ()


def test_the_newest_release_is_the_one_of_the_constraints():
    text = (ROOT / "requirements" / "constraints.txt").read_text()
    newest = next(one for one in ENVIRONMENTS if one.release == RELEASES[-1])
    assert f"\nmegatron-core=={newest.release.version}\n" in text
    assert f"\ntorch=={newest.torch}\n" in text
    assert f"on Python {newest.python}." in text
    assert len({one.name for one in ENVIRONMENTS}) == len(ENVIRONMENTS)


def test_the_page_lists_every_environment():
    text = (ROOT / "docs" / "versions.md").read_text()
    for one in ENVIRONMENTS:
        wanted = f"| {one.release.version} | .*| {one.python} | {one.torch}"
        assert re.search(wanted, text), one.name
    for release in RELEASES:
        assert f"`{release.tag}.diff`" in text


def test_the_package_asks_for_the_oldest_release():
    assert f'"megatron-core>={RELEASES[0].version}"' in (ROOT / "setup.py").read_text()
