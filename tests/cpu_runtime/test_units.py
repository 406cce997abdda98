# SPDX-License-Identifier: Apache-2.0
"""Every unit of the CPU runtime does its work, and is needed for it."""

import pytest

from tests.cpu_runtime.fresh_process import FreshProcessError, run_fresh
from tests.cpu_runtime.unit_checks import CHECKS, run_check


def unit_texts() -> dict[str, tuple[str, str]]:
    from megatron_seqpar import cpu_runtime

    return {name: (each.reason, each.serves) for name, each in cpu_runtime.units().items()}


def test_every_unit_has_a_check_a_reason_and_a_place_it_serves() -> None:
    texts = run_fresh(unit_texts)
    assert set(texts) == set(CHECKS)
    for name, (reason, serves) in texts.items():
        assert len(reason) > 30, name
        assert ".py" in serves or "fused_kernels" in serves, name


@pytest.mark.parametrize("name", sorted(CHECKS))
def test_passes_with_all_units(name: str) -> None:
    run_fresh(run_check, name, None)


@pytest.mark.parametrize("name", sorted(CHECKS))
def test_fails_without_the_unit(name: str) -> None:
    with pytest.raises(FreshProcessError):
        run_fresh(run_check, name, name)
