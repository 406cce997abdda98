# SPDX-License-Identifier: Apache-2.0
"""Clusters for the planner: configs/planner/NAME.yaml beside configs/clusters/NAME.yaml.

    cluster: dgx-a100            the description of peak, links and attention kernel
    memory_gib: {value: 79.1, basis: published, source: ...}
    adapters: {value: 8, ...}    network adapters of a node, in place of the description's
    like: dgx-a100               constants of another file, as assumptions here
    constants:
      gemm_share: {value: 0.81, basis: calibrated, source: ...}

What a file does not say keeps its prior. A cluster without such a file is refused, since nobody
knows what a rank of it can hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from ..errors import ClusterError
from ..simulate import cluster_names, load_cluster, split_nodes
from ..simulate.cluster import Basis as MachineBasis
from ..simulate.cluster import Figure
from .constants import Basis, Constants
from .hardware import Cluster, Origin

_HERE = Path(__file__).resolve()
_FOLDERS = (
    _HERE.parents[1] / "configs" / "planner",  # in a wheel
    _HERE.parents[2] / "configs" / "planner",  # in the repository
)
_GIB = 2**30


def _folder() -> Path:
    return next((folder for folder in _FOLDERS if folder.is_dir()), _FOLDERS[-1])


def model_folder() -> Path:
    """The folder of the model files that come with the package."""
    return _folder().parent / "models"


def planner_clusters() -> tuple[str, ...]:
    """Names of the clusters that come with the package."""
    return tuple(sorted(path.stem for path in _folder().glob("*.yaml")))


def read_planner_cluster(name_or_path: str | Path) -> Cluster:
    """A cluster by its name, by its file's path, or by the path of its description.

    Each may end in `-xN` for N nodes. Raises ClusterError for hardware that nothing is known of, or
    a file with a wrong field.
    """
    name, nodes = split_nodes(name_or_path)
    if nodes is not None:
        found = read_planner_cluster(name)
        return replace(found, machine=replace(found.machine, nodes=nodes))
    path = Path(name)
    if name in planner_clusters():
        path = _folder() / f"{name}.yaml"
    elif path.suffix not in (".yaml", ".yml"):
        raise ClusterError(
            f"--cluster {name}: unknown hardware; use one of {', '.join(planner_clusters())}, or "
            "write a file with its description and memory_gib (docs/planner.md)"
        )
    elif path.parent.name == "clusters" and path.stem in planner_clusters():
        path = _folder() / path.name
    content = _yaml(path)
    if "cluster" not in content:
        raise ClusterError(
            f"--cluster {path}: says nothing of 'cluster' and 'memory_gib', so what a rank can "
            f"hold is unknown; name one of {', '.join(planner_clusters())}, or add a file with both"
        )
    return _parse(content, path)


def _yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ClusterError(f"cluster file {path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ClusterError(f"cluster file {path}: not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise ClusterError(f"cluster file {path}: a mapping is expected")
    return content


def _parse(content: Mapping[str, Any], path: Path) -> Cluster:
    unknown = set(content) - {"cluster", "memory_gib", "adapters", "like", "constants"}
    if unknown:
        raise ClusterError(f"cluster file {path}: unknown field {sorted(unknown)[0]}")
    values: dict[str, float] = {}
    origins: dict[str, Origin] = {}
    if "like" in content:
        other = read_planner_cluster(content["like"])
        for name in other.origins:
            values[name] = getattr(other.constants, name)
            origins[name] = Origin(Basis.ASSUMED, f"as on {other.name}")
    given = content.get("constants") or {}
    for name, entry in given.items():
        if name not in Constants.names():
            known = ", ".join(Constants.names())
            raise ClusterError(f"cluster file {path}: constants.{name}: unknown; it may be {known}")
        values[name], origins[name] = _entry(entry, f"{path}: constants.{name}")
    memory, origin = _entry(content.get("memory_gib"), f"{path}: memory_gib")
    machine = str(content["cluster"])
    beside = path.parent / machine
    described = load_cluster(beside if beside.suffix in (".yaml", ".yml") else machine)
    if "adapters" in content:
        count, source = _entry(content["adapters"], f"{path}: adapters")
        figure = Figure(count, _machine_basis(source.basis), source.source)
        described = replace(described, adapters=figure)
    return Cluster(
        machine=described,
        capacity=Figure(memory * _GIB, _machine_basis(origin.basis), origin.source),
        constants=Constants().changed(values),
        origins=origins,
    )


def _machine_basis(basis: Basis) -> MachineBasis:
    return MachineBasis.MEASURED if basis is Basis.CALIBRATED else MachineBasis(basis.value)


def _entry(entry: Any, where: str) -> tuple[float, Origin]:
    """The value of {value, basis, source} and its origin."""
    bases = [basis.value for basis in Basis]
    if not isinstance(entry, dict) or set(entry) != {"value", "basis", "source"}:
        raise ClusterError(f"cluster file {where}: {entry!r}: value, basis and source are needed")
    value = entry["value"]
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
        raise ClusterError(f"cluster file {where}: value {value!r}: a number above 0 is needed")
    if entry["basis"] not in bases:
        raise ClusterError(
            f"cluster file {where}: basis {entry['basis']!r}: use one of {', '.join(bases)}"
        )
    return float(value), Origin(Basis(entry["basis"]), str(entry["source"]))


def save_planner_cluster(cluster: Cluster, path: Path, comment: str = "") -> None:
    """Write a file that `read_planner_cluster` reads back. ClusterError when that fails.

    A machine that does not come with the package is named by a path beside the file.
    """
    constants = {
        name: {
            "value": float(f"{getattr(cluster.constants, name):.4g}"),
            "basis": cluster.origins[name].basis.value,
            "source": cluster.origins[name].source,
        }
        for name in Constants.names()
        if name in cluster.origins
    }
    content: dict[str, Any] = {
        "cluster": cluster.name,
        "memory_gib": {
            "value": float(f"{cluster.capacity.value / _GIB:.5g}"),
            "basis": cluster.capacity.basis.value,
            "source": cluster.capacity.source,
        },
    }
    adapters = cluster.machine.adapters
    if cluster.name in cluster_names() and adapters != load_cluster(cluster.name).adapters:
        content["adapters"] = {
            "value": adapters.value,
            "basis": adapters.basis.value,
            "source": adapters.source,
        }
    content["constants"] = constants
    text = "# SPDX-License-Identifier: Apache-2.0\n"
    text += "".join(f"# {line}\n" for line in comment.splitlines())
    text += yaml.safe_dump(content, sort_keys=False, width=100, allow_unicode=True)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ClusterError(f"cluster file {path}: cannot be written: {error}") from None
