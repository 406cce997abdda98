# SPDX-License-Identifier: Apache-2.0
"""What is made of NVML's answers, and of their absence."""

from __future__ import annotations

import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from megatron_seqpar.errors import ClusterError
from megatron_seqpar.simulate import load_cluster, save_cluster
from megatron_seqpar.simulate.cluster import LinkKind
from megatron_seqpar.simulate.topology import cluster_for, detect

from .nvml import Nvml

A100, H100 = "NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3"


def every_pair(count: int) -> set[tuple[int, int]]:
    return set(combinations(range(count), 2))


def test_gpus_on_a_switch() -> None:
    nvml = Nvml([H100] * 8, every_pair(8), switches=True)
    found = detect(nvml, {})
    assert found.models == (H100,) * 8
    assert found.joined_by is LinkKind.NVSWITCH
    assert [row[index] for index, row in enumerate(found.links)] == [LinkKind.SELF] * 8
    assert nvml.open == 0
    cluster = cluster_for(nvml=nvml, environ={})
    assert cluster.name == "dgx-h100"
    assert cluster.ranks_per_node.value == 8
    assert cluster.note == (
        f"found 8 x {H100}, joined by nvswitch: took cluster dgx-h100, its network included"
    )


def test_some_gpus_joined_by_bridges() -> None:
    found = detect(Nvml([A100] * 4, {(0, 1), (2, 3)}), {})
    assert found.links[0] == (LinkKind.SELF, LinkKind.NVLINK, LinkKind.PCIE, LinkKind.PCIE)
    assert found.links[3] == (LinkKind.PCIE, LinkKind.PCIE, LinkKind.NVLINK, LinkKind.SELF)
    assert found.joined_by is LinkKind.PCIE  # the slowest of them is what a schedule meets


@pytest.mark.parametrize("model", ["A100", "A800", "H100", "H200", "B200", "L40S"])
def test_models_have_their_clusters(model: str) -> None:
    expected = {"A800": "dgx-a100", "L40S": "pcie-box"}.get(model, f"dgx-{model.lower()}")
    links = set() if model == "L40S" else every_pair(2)
    nvml = Nvml([f"NVIDIA {model}-SXM"] * 2, links, switches=True)
    cluster = cluster_for(nvml=nvml, environ={})
    assert cluster.name == expected
    assert cluster.ranks_per_node.value == 2


def test_a_known_gpu_without_nvlink_takes_its_device_and_pcies_links() -> None:
    cluster = cluster_for(nvml=Nvml([A100] * 2), environ={})
    box, known = load_cluster("pcie-box"), load_cluster("dgx-a100")
    assert (cluster.device, cluster.kernel) == (known.device, known.kernel)
    assert (cluster.intra, cluster.one_port) == (box.intra, box.one_port)
    assert "took the links of pcie-box and the device of dgx-a100" in cluster.note


def test_a_single_gpu_takes_the_cluster_of_its_model() -> None:
    cluster = cluster_for(nvml=Nvml([H100]), environ={})
    assert cluster.name == "dgx-h100"
    assert cluster.ranks_per_node.value == 1


def test_an_unknown_gpu_says_so() -> None:
    cluster = cluster_for(nvml=Nvml(["NVIDIA Z900"] * 2), environ={})
    assert cluster.note == (
        "found 2 x NVIDIA Z900, joined by pcie, of no known cluster: took pcie-box"
    )


@pytest.mark.parametrize(
    ("listed", "expected"),
    [("1,0", ["B", "A"]), ("GPU-2", ["C"]), (" 2 , GPU-0 ", ["C", "A"]), ("0,9,1", ["A"]),
     ("0,-1,1", ["A"]), ("", []), ("GPU-7,0", [])],
)  # fmt: skip
def test_only_visible_gpus_count(listed: str, expected: list[str]) -> None:
    found = detect(Nvml(["A", "B", "C"]), {"CUDA_VISIBLE_DEVICES": listed})
    assert list(found.models) == expected
    assert bool(found.why_none) == (not expected)


def test_no_driver() -> None:
    nvml = Nvml([], fails={"nvmlInit": 9})
    assert detect(nvml, {}).why_none == "NVML found no driver: Driver Not Loaded"
    cluster = cluster_for(nvml=nvml, environ={})
    assert cluster.name == "laptop"
    assert cluster.note == "NVML found no driver: Driver Not Loaded: took cluster laptop"


def test_a_driver_that_does_not_answer_is_shut_down_again() -> None:
    nvml = Nvml([A100], fails={"nvmlDeviceGetName": 3})
    assert detect(nvml, {}).why_none == "NVML does not answer: Not Supported"
    assert nvml.open == 0


def test_gpus_without_nvlink_answer_not_supported() -> None:
    found = detect(Nvml([A100] * 2, fails={"nvmlDeviceGetP2PStatus": 3}), {})
    assert found.joined_by is LinkKind.PCIE


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    found = detect(environ={})
    assert found.why_none.startswith("nvidia-ml-py is not installed (pip install")


def test_the_package_is_used_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml: Any = Nvml([A100])
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert detect(environ={}).models == (A100,)


def test_ranks_of_a_node() -> None:
    nvml = Nvml([A100] * 8, every_pair(8), switches=True)

    def ranks(name: str | None = None, environ: Any = None, **options: Any) -> float:
        found = cluster_for(name, nvml=nvml, environ=environ or {}, **options)
        return found.ranks_per_node.value

    assert ranks() == 8
    assert ranks(environ={"LOCAL_WORLD_SIZE": "4"}) == 4
    assert ranks(environ={"LOCAL_WORLD_SIZE": "4"}, ranks_per_node=2) == 2
    # a named cluster is what it says, wherever this process runs
    assert ranks("dgx-h100", environ={"LOCAL_WORLD_SIZE": "4"}) == 8
    assert ranks("dgx-h100", ranks_per_node=3) == 3
    with pytest.raises(ClusterError, match="LOCAL_WORLD_SIZE=four: give a whole number >= 1"):
        ranks(environ={"LOCAL_WORLD_SIZE": "four"})


def test_a_cluster_by_path(tmp_path: Path) -> None:
    save_cluster(load_cluster("pcie-box"), tmp_path / "mine.yaml")
    assert cluster_for(str(tmp_path / "mine.yaml")).name == "mine"
    assert cluster_for(tmp_path / "mine.yaml").intra == load_cluster("pcie-box").intra
