# SPDX-License-Identifier: Apache-2.0
"""The releases of megatron-core that the plugin was run with, in one place.

A *family* is the `major.minor` of a release. Patch points name the families they were checked on
(`integration/patch_points.py`); doctor, the CPU runtime, refusals, the patches for forks and
`scripts/test_matrix.sh` read the releases from here.

Pure Python: imports neither torch nor Megatron.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Release:
    """A release of megatron-core.

    version: of the package, as pip knows it.
    tag: of the Megatron-LM repository, whose pretraining scripts were run with it.
    brings_training: whether the package holds `megatron.training`; else it comes from a checkout.
    """

    version: str
    tag: str
    brings_training: bool = True

    @property
    def family(self) -> str:
        """'0.19' of '0.19.2'."""
        return family(self.version)


@dataclass(frozen=True)
class Environment:
    """One row of the test matrix: a release with the Python and torch that it is run with.

    core_only: without `megatron.training`, so no training run.
    """

    release: Release
    python: str
    torch: str
    core_only: bool = False

    @property
    def name(self) -> str:
        """What `scripts/test_matrix.sh` calls it: '0.19.2', '0.16.1-py3.11'."""
        usual = self.python == ENVIRONMENTS[0].python
        return self.release.version if usual else f"{self.release.version}-py{self.python}"


RELEASES = (
    Release("0.16.1", "core_v0.16.1", brings_training=False),
    Release("0.17.1", "core_v0.17.1"),
    Release("0.18.2", "core_v0.18.2"),
    Release("0.19.2", "core_v0.19.0"),
)
"""Oldest first; the last is the one that the project is developed with."""

ENVIRONMENTS = (
    *(Environment(release, python="3.12", torch="2.11.0") for release in RELEASES),
    Environment(RELEASES[0], python="3.11", torch="2.13.0", core_only=True),
)


def numbers(version: str) -> tuple[int, ...]:
    """The leading integers of a version: (0, 19, 2) of '0.19.2+abc'."""
    out: list[int] = []
    for part in version.split("+")[0].split("."):
        digits = "".join(ch for ch in part if ch.isdigit())
        if not digits:
            break
        out.append(int(digits))
    return tuple(out)


def family(version: str) -> str:
    """'0.19' of '0.19.2', of '0.19.2rc1' and of '0.19'."""
    return ".".join(str(number) for number in numbers(version)[:2])


FAMILIES = tuple(release.family for release in RELEASES)
"""Oldest first."""


def since(oldest: str) -> tuple[str, ...]:
    """The known families from `oldest` on."""
    return tuple(known for known in FAMILIES if numbers(known) >= numbers(oldest))


def before(newer: str) -> tuple[str, ...]:
    """The known families older than `newer`."""
    return tuple(known for known in FAMILIES if numbers(known) < numbers(newer))


def is_known(version: str) -> bool:
    """Whether releases of this version's family were run."""
    return family(version) in FAMILIES


def distance(one: str, other: str) -> int:
    """How far apart two versions' families are; a major version is further than any minor one."""
    (major, minor), (other_major, other_minor) = ((*numbers(v), 0, 0)[:2] for v in (one, other))
    return abs(1000 * (major - other_major) + minor - other_minor)


def nearest(version: str) -> Release:
    """The known release whose family is closest to that of `version`."""
    return min(RELEASES, key=lambda release: distance(release.version, version))
