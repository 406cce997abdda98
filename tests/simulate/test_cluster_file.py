# SPDX-License-Identifier: Apache-2.0
"""Cluster files: those that come with the package, what is refused and how, writing them back."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_seqpar.errors import ClusterError
from megatron_seqpar.simulate import (
    Cluster,
    cluster_names,
    link_matrix,
    load_cluster,
    save_cluster,
    split_nodes,
)
from megatron_seqpar.simulate.cluster import Basis, Figure, Figures, LinkKind
from megatron_seqpar.simulate.cluster_file import as_mapping, parse_cluster

from .plans import cluster, curve

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGED = (
    "dgx-a100", "dgx-a100-100g", "dgx-b200", "dgx-h100", "dgx-h200", "laptop", "pcie-box",
)  # fmt: skip


def figures(value: Any) -> Iterator[Figure | Figures]:
    """Every figure of a cluster."""
    if isinstance(value, Figure | Figures):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from figures(inner)
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            yield from figures(getattr(value, name))


def test_packaged_clusters() -> None:
    assert cluster_names() == PACKAGED


@pytest.mark.parametrize("name", PACKAGED)
def test_every_number_says_where_it_comes_from(name: str) -> None:
    found = list(figures(load_cluster(name)))
    assert len(found) >= 27
    assert all(figure.source.strip() and len(figure.source) > 5 for figure in found)
    if name != "laptop":
        assert not [figure for figure in found if figure.basis == "measured"]


@pytest.mark.parametrize("name", PACKAGED)
def test_written_and_read_again(name: str, tmp_path: Path) -> None:
    before = load_cluster(name)
    save_cluster(before, tmp_path / f"{name}.yaml")
    assert load_cluster(tmp_path / f"{name}.yaml") == before


@pytest.mark.parametrize("nodes", [1, 4, 128])
@pytest.mark.parametrize("name", ["dgx-a100", "dgx-h100", "dgx-h200", "dgx-b200"])
def test_a_number_of_nodes_in_the_name(name: str, nodes: int) -> None:
    for written in (f"{name}-x{nodes}", f"configs/clusters/{name}-x{nodes}.yaml"):
        found = load_cluster(REPOSITORY / written if "/" in written else written)
        assert found == replace(load_cluster(name), nodes=nodes)


def test_no_more_ranks_than_the_nodes_hold() -> None:
    cluster = load_cluster("dgx-h100-x2")
    cluster.check_holds(16, "--size 16")
    with pytest.raises(ClusterError, match=r"--size 17: .*2 nodes of 8.* name it dgx-h100-x3"):
        cluster.check_holds(17, "--size 17")
    load_cluster("dgx-h100").check_holds(10**6, "--size 1000000")  # nobody said how many


def test_a_name_that_only_looks_like_nodes(tmp_path: Path) -> None:
    own = tmp_path / "rack-x2.yaml"
    save_cluster(load_cluster("pcie-box"), own)
    assert split_nodes(own) == (str(own), None)
    assert load_cluster(own).nodes is None
    assert split_nodes("dgx-a100-100g") == ("dgx-a100-100g", None)
    with pytest.raises(ClusterError, match="dgx-h100-x0: use 1 node or more"):
        load_cluster("dgx-h100-x0")
    with pytest.raises(ClusterError, match="cluster dgx-z1: unknown"):
        load_cluster("dgx-z1-x4")


def test_published_numbers() -> None:
    a100, slow, h100 = (load_cluster(n) for n in ("dgx-a100", "dgx-a100-100g", "dgx-h100"))
    assert a100.intra.line_rate.value == 300e9
    assert a100.intra.bandwidth == pytest.approx(231e9)
    assert (a100.inter.line_rate.value, a100.adapters.value) == (25e9, 8)  # 8 x 200 Gb/s
    assert (slow.inter.line_rate.value, slow.adapters.value) == (12.5e9, 1)  # 100 Gb/s a node
    assert a100.peak("bfloat16") == 312e12
    assert h100.peak("torch.bfloat16") == 989.4e12
    assert h100.device.memory.value == 3350e9


def test_share_of_the_peak_between_head_dims() -> None:
    shares = {64: Figure(0.4, Basis.ASSUMED, "x"), 128: Figure(0.6, Basis.ASSUMED, "x")}
    two = replace(curve(), share=shares)
    found = [two.share_at(dim) for dim in (32, 64, 80, 128, 256)]
    assert found == pytest.approx([0.4, 0.4, 0.45, 0.6, 0.6])


def test_half_the_speed_is_lost_where_the_curve_says() -> None:
    some = curve(share=0.8, half_rows=100, half_keys=50)
    assert some.efficiency(1e12, 1e12, 128) == pytest.approx(0.8)
    assert some.efficiency(100, 1e12, 128) == pytest.approx(0.4)
    assert some.efficiency(1e12, 50, 128) == pytest.approx(0.4)


# ---- what is refused ------------------------------------------------------------------------

WRONG: list[tuple[str, Any, str]] = [
    ("ranks_per_node.value", 0, "ranks_per_node.value = 0: give a whole number >= 1"),
    ("ranks_per_node.value", 2.5, r"ranks_per_node.value = 2.5: give a whole number >= 1"),
    ("ranks_per_node.value", True, "ranks_per_node.value = True: give a whole number >= 1"),
    ("ranks_per_node", 8, "ranks_per_node = 8: give a mapping of fields"),
    ("device.name", 7, "device.name = 7: give a text"),
    ("device.models", "A100", "device.models = 'A100': give a list of texts"),
    ("device.peak_tflops.values", {}, "peak_tflops.values = {}: give a mapping from names"),
    ("device.peak_tflops.values.bfloat16", 0, "values.bfloat16 = 0: give a number > 0"),
    ("device.memory_gbytes_per_s.value", "fast", "value = 'fast': give a number > 0"),
    ("device.memory_gbytes_per_s.value", float("nan"), "value = nan: give a number > 0"),
    ("device.memory_gbytes_per_s.value", float("inf"), "value = inf: give a number > 0"),
    ("device.memory_gbytes_per_s.basis", "guess", "'guess': give one of measured, published, assu"),
    ("device.memory_gbytes_per_s.source", "", "source = '': give a text"),
    ("kernel.forward.full.share", {}, "full.share = {}: give a mapping from head dims"),
    ("kernel.forward.full.share.128.value", 1.5, "128.value = 1.5: give a number > 0 and <= 1"),
    ("kernel.backward.band.half_keys.value", -1, "half_keys.value = -1: give a number >= 0"),
    ("links.intra.kind", "carrier pigeon", "give one of memory, nvswitch, nvlink, pcie, network"),
    ("links.intra.latency_us.value", -0.5, "intra.latency_us.value = -0.5: give a number >= 0"),
    ("links.duplex", "yes please", "links.duplex = 'yes please': give true or false"),
    ("links.overlap_tax.value", 2, "overlap_tax.value = 2: give a number >= 0 and <= 1"),
    ("links.speed", 3, "links.speed is not a field; use intra, inter, adapters"),
    ("color", "red", "color is not a field; use links, ranks_per_node, device"),
]


def changed(path: str, value: Any) -> dict[str, Any]:
    """A valid description with one field set."""
    content: Any = copy.deepcopy(as_mapping(load_cluster("dgx-a100")))
    *parents, last = [int(part) if part.isdecimal() else part for part in path.split(".")]
    at = content
    for part in parents:
        at = at[part]
    at[last] = value
    return content  # type: ignore[no-any-return]


@pytest.mark.parametrize(("path", "value", "message"), WRONG)
def test_a_wrong_field_is_named(path: str, value: Any, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(changed(path, value)), encoding="utf-8")
    with pytest.raises(ClusterError) as caught:
        load_cluster(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "path", ["links", "links.intra.share", "device.peak_tflops.values", "kernel.backward.full"]
)
def test_a_missing_field_is_named(path: str) -> None:
    content = as_mapping(load_cluster("dgx-a100"))
    at: Any = content
    *parents, last = path.split(".")
    for part in parents:
        at = at[part]
    del at[last]
    with pytest.raises(ClusterError, match=rf"mine\.yaml: {path} is missing: give a mapping"):
        parse_cluster(content, "mine.yaml", "mine")


def test_files_that_are_no_clusters(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"missing\.yaml: cannot be read"):
        load_cluster(tmp_path / "missing.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1", encoding="utf-8")
    with pytest.raises(ClusterError, match=r"broken\.yaml: not valid YAML"):
        load_cluster(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n", encoding="utf-8")
    with pytest.raises(ClusterError, match=r"the whole file = \[1\]: give a mapping of fields"):
        load_cluster(tmp_path / "list.yaml")
    with pytest.raises(ClusterError, match=r"cluster dgx-z9: unknown; use one of dgx-a100, dgx-a"):
        load_cluster("dgx-z9")
    with pytest.raises(ClusterError, match="cannot be written"):
        save_cluster(load_cluster("laptop"), tmp_path / "no" / "where.yaml")


# ---- nodes ----------------------------------------------------------------------------------


def test_link_of_each_pair() -> None:
    kinds = link_matrix(load_cluster("dgx-h100").with_ranks_per_node(2), 4)
    near, far, self_ = LinkKind.NVSWITCH, LinkKind.NETWORK, LinkKind.SELF
    assert kinds == [
        [self_, near, far, far],
        [near, self_, far, far],
        [far, far, self_, near],
        [far, far, near, self_],
    ]


def test_groups_of_a_node_share_its_adapters() -> None:
    whole = load_cluster("dgx-a100")

    def adapters(one: Cluster) -> tuple[float, float]:
        return one.adapters.value, one.inter.line_rate.value

    # tensor parallelism of 4 leaves two ranks of each node to a group, and two adapters
    assert adapters(whole.with_ranks_per_node(2, groups=4)) == (2, 25e9)
    # three groups get 8/3 adapters each: three at 8/9 of their speed
    assert adapters(whole.with_ranks_per_node(2, groups=3)) == (3, pytest.approx(25e9 * 8 / 9))
    # half an adapter: one at half its speed
    slow = load_cluster("dgx-a100-100g").with_ranks_per_node(4, groups=2)
    assert adapters(slow) == (1, 6.25e9)
    assert "2 groups of a node share" in slow.inter.line_rate.source
    assert adapters(whole.with_ranks_per_node(4)) == (8, 25e9)
    with pytest.raises(ClusterError, match="ranks per node = 0 and groups = 1 must be >= 1"):
        cluster().with_ranks_per_node(0)


# ---- installed ------------------------------------------------------------------------------


def test_a_built_package_brings_its_clusters(tmp_path: Path) -> None:
    build = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(build, cwd=REPOSITORY, check=True, capture_output=True, timeout=120)
    check = (
        "import megatron_seqpar.simulate as s\n"
        "print(s.__file__, *s.cluster_names(), s.load_cluster('dgx-h100').ranks_per_node.value)"
    )
    done = subprocess.run(
        [sys.executable, "-c", check], cwd=tmp_path, check=True, capture_output=True, text=True,
        env={"PYTHONPATH": str(tmp_path)}, timeout=60,
    )  # fmt: skip
    where, *rest = done.stdout.split()
    assert Path(where).is_relative_to(tmp_path)
    assert rest == [*PACKAGED, "8.0"]
