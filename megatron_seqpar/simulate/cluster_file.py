# SPDX-License-Identifier: Apache-2.0
"""Cluster descriptions as YAML: read with every field checked, written back, found by name.

A number is written as

    latency_us: {value: 3.0, basis: published, source: "NVIDIA/nccl issue 1487"}

and numbers of one source with `values: {bfloat16: 312, float32: 19.5}` in place of `value`. Units
are in the names: tflops (1e12 FLOP/s), gbytes_per_s (1e9 bytes/s), us (microseconds).

A file describes a node and the network, not how many nodes there are: `dgx-h100-x4`, or
`configs/clusters/dgx-h100-x4.yaml`, is four nodes of dgx-h100.
`ClusterError` names the file, the field, what stands there and what may.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from ..errors import ClusterError
from .cluster import Basis, Cluster, Curve, Device, Figure, Figures, Kernel, Link, LinkKind

_TERA, _GIGA, _MICRO = 1e12, 1e9, 1e-6
_PASSES = ("forward", "backward")
_KINDS = ("full", "band")
_HERE = Path(__file__).resolve()
_FOLDERS = (
    _HERE.parents[1] / "configs" / "clusters",  # in a wheel
    _HERE.parents[2] / "configs" / "clusters",  # in the repository
)


def cluster_names() -> tuple[str, ...]:
    """Names of the clusters that come with the package."""
    return tuple(sorted(path.stem for folder in _folders() for path in folder.glob("*.yaml")))


def _folders() -> list[Path]:
    return [folder for folder in _FOLDERS if folder.is_dir()][:1]


def split_nodes(name_or_path: str | Path) -> tuple[str, int | None]:
    """`("dgx-h100", 4)` for `dgx-h100-x4`; the same for a path, which keeps its ending.

    A name or a file that exists as it is written means itself, with no number of nodes. Raises
    `ClusterError` for no nodes.
    """
    text = str(name_or_path)
    found = re.fullmatch(r"(.+)-x(\d+)(\.ya?ml)?", text)
    if found is None or text in cluster_names() or Path(text).is_file():
        return text, None
    nodes = int(found[2])
    if nodes < 1:
        raise ClusterError(f"cluster {text}: use 1 node or more, such as {found[1]}-x4")
    return found[1] + (found[3] or ""), nodes


def load_cluster(name_or_path: str | Path) -> Cluster:
    """A cluster by its name in configs/clusters, or by the path of a YAML file.

    Either may end in `-xN` for N nodes. Raises `ClusterError` when there is no such file or a field
    of it is wrong.
    """
    base, nodes = split_nodes(name_or_path)
    if nodes is not None:
        return replace(load_cluster(base), nodes=nodes)
    if str(name_or_path) in cluster_names():
        return _load(_folders()[0] / f"{name_or_path}.yaml")
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        raise ClusterError(
            f"cluster {name_or_path!s}: unknown; use one of {', '.join(cluster_names())}, "
            "or the path of a .yaml file"
        )
    return read_cluster(path)


@lru_cache(maxsize=32)
def _load(path: Path) -> Cluster:
    return read_cluster(path)


def read_cluster(path: Path) -> Cluster:
    """The cluster of a YAML file; `ClusterError` names the field that is wrong."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as failure:
        raise ClusterError(f"cluster file {path}: cannot be read: {failure}") from None
    except yaml.YAMLError as failure:
        raise ClusterError(f"cluster file {path}: not valid YAML: {failure}") from None
    return parse_cluster(content, str(path), path.stem)


def parse_cluster(content: object, file: str, name: str) -> Cluster:
    """The cluster of a mapping, as `as_mapping` makes it; `file` is for messages."""
    root = _Fields(content, file, "")
    links = root.fields("links")
    cluster = Cluster(
        name=name,
        ranks_per_node=root.count("ranks_per_node"),
        device=_device(root.fields("device")),
        kernel=_kernel(root.fields("kernel")),
        intra=_link(links.fields("intra")),
        inter=_link(links.fields("inter")),
        adapters=links.count("adapters"),
        message_overhead=links.figure("message_overhead_us", _MICRO),
        duplex=links.flag("duplex"),
        one_port=links.flag("one_port"),
        overlap_tax=links.figure("overlap_tax", most=1.0),
    )
    links.end()
    root.end()
    return cluster


def _device(fields: _Fields) -> Device:
    device = Device(
        name=fields.text("name"),
        peak=fields.figures("peak_tflops", _TERA),
        memory=fields.figure("memory_gbytes_per_s", _GIGA, above=0.0),
        small_kernel=fields.figure("small_kernel_us", _MICRO),
        models=fields.texts("models"),
    )
    fields.end()
    return device


def _kernel(fields: _Fields) -> Kernel:
    curves = {}
    for direction in _PASSES:
        both = fields.fields(direction)
        for kind in _KINDS:
            curve = both.fields(kind)
            curves[f"{direction}_{kind}"] = Curve(
                launch=curve.figure("launch_us", _MICRO),
                share=curve.shares("share"),
                half_rows=curve.figure("half_rows"),
                half_keys=curve.figure("half_keys"),
            )
            curve.end()
        both.end()
    fields.end()
    return Kernel(**curves)


def _link(fields: _Fields) -> Link:
    kinds = [kind.value for kind in LinkKind if kind is not LinkKind.SELF]
    link = Link(
        kind=LinkKind(fields.text("kind", kinds)),
        line_rate=fields.figure("line_rate_gbytes_per_s", _GIGA, above=0.0),
        share=fields.figure("share", most=1.0, above=0.0),
        latency=fields.figure("latency_us", _MICRO),
    )
    fields.end()
    return link


class _Fields:
    """A mapping of the file: hands out its fields, each checked, and refuses what is left over."""

    def __init__(self, content: object, file: str, path: str) -> None:
        self.file, self.path = file, path
        if not isinstance(content, dict):
            raise self._wrong("", content, "a mapping of fields")
        self.content: dict[Any, Any] = content
        self.asked: list[str | int] = []

    def _where(self, field: str | int) -> str:
        return ".".join(part for part in (self.path, str(field)) if part) or "the whole file"

    def _wrong(self, field: str | int, value: object, expected: str) -> ClusterError:
        return ClusterError(f"{self.file}: {self._where(field)} = {value!r}: give {expected}")

    def _take(self, field: str | int, expected: str) -> Any:
        self.asked.append(field)
        if field not in self.content:
            raise ClusterError(f"{self.file}: {self._where(field)} is missing: give {expected}")
        return self.content[field]

    def end(self) -> None:
        """Refuse fields that nobody asked for."""
        for field in self.content:
            if field not in self.asked:
                fields = ", ".join(map(str, self.asked))
                raise ClusterError(
                    f"{self.file}: {self._where(field)} is not a field; use {fields}"
                )

    def fields(self, field: str | int) -> _Fields:
        """A mapping within this one."""
        value = self._take(field, "a mapping of fields")
        return _Fields(value, self.file, self._where(field))

    def text(self, field: str, choices: list[str] | None = None) -> str:
        """A text, one of `choices` where those are given."""
        expected = "a text" if choices is None else f"one of {', '.join(choices)}"
        value = self._take(field, expected)
        if not isinstance(value, str) or not value or (choices and value not in choices):
            raise self._wrong(field, value, expected)
        return value

    def texts(self, field: str) -> tuple[str, ...]:
        """A list of texts, maybe empty."""
        value = self._take(field, "a list of texts")
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise self._wrong(field, value, "a list of texts")
        return tuple(value)

    def flag(self, field: str) -> bool:
        """true or false."""
        value = self._take(field, "true or false")
        if not isinstance(value, bool):
            raise self._wrong(field, value, "true or false")
        return value

    def _number(
        self, field: str | int, value: object, above: float | None, most: float | None
    ) -> float:
        limits = "a number >= 0" if above is None else f"a number > {above:g}"
        limits += "" if most is None else f" and <= {most:g}"
        good = isinstance(value, int | float) and not isinstance(value, bool)
        number = float(value) if good else -1.0  # type: ignore[arg-type]
        low = number < 0 if above is None else number <= above
        # written so that NaN fails as well
        if not good or low or not number < float("inf") or (most is not None and number > most):
            raise self._wrong(field, value, limits)
        return number

    def figure(
        self,
        field: str,
        unit: float = 1.0,
        *,
        above: float | None = None,
        most: float | None = None,
    ) -> Figure:
        """A number with its source, in units of `unit`."""
        inner = self.fields(field)
        value = inner._number("value", inner._take("value", "a number"), above, most)
        return Figure(value * unit, *inner._origin())

    def count(self, field: str) -> Figure:
        """A whole number from 1 on, with its source."""
        inner = self.fields(field)
        value = inner._take("value", "a whole number >= 1")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise inner._wrong("value", value, "a whole number >= 1")
        return Figure(float(value), *inner._origin())

    def figures(self, field: str, unit: float) -> Figures:
        """Numbers above 0 by name with their common source, in units of `unit`; at least one."""
        inner = self.fields(field)
        expected = "a mapping from names to numbers"
        values = inner._take("values", expected)
        if not isinstance(values, dict) or not values:
            raise inner._wrong("values", values, expected)
        numbers = {
            str(key): inner._number(f"values.{key}", value, 0.0, None) * unit
            for key, value in values.items()
        }
        return Figures(numbers, *inner._origin())

    def shares(self, field: str) -> dict[int, Figure]:
        """Figures above 0 and to 1 by head dim; at least one."""
        inner = self.fields(field)
        dims = list(inner.content)
        if not dims or not all(isinstance(dim, int) and dim > 0 for dim in dims):
            raise inner._wrong("", inner.content, "a mapping from head dims to figures")
        return {dim: inner.figure(dim, above=0.0, most=1.0) for dim in sorted(dims)}

    def _origin(self) -> tuple[Basis, str]:
        basis = Basis(self.text("basis", [basis.value for basis in Basis]))
        source = self.text("source")
        self.end()
        return basis, source


def as_mapping(cluster: Cluster) -> dict[str, Any]:
    """The cluster as its YAML file holds it; `parse_cluster` reads it back."""
    kernel: dict[str, Any] = {}
    for direction in _PASSES:
        kernel[direction] = {}
        for kind in _KINDS:
            curve: Curve = getattr(cluster.kernel, f"{direction}_{kind}")
            kernel[direction][kind] = {
                "launch_us": _plain(curve.launch, _MICRO),
                "share": {dim: _plain(figure) for dim, figure in curve.share.items()},
                "half_rows": _plain(curve.half_rows),
                "half_keys": _plain(curve.half_keys),
            }
    device = cluster.device
    return {
        "ranks_per_node": _plain(cluster.ranks_per_node, count=True),
        "device": {
            "name": device.name,
            "models": list(device.models),
            "peak_tflops": _plain(device.peak, _TERA),
            "memory_gbytes_per_s": _plain(device.memory, _GIGA),
            "small_kernel_us": _plain(device.small_kernel, _MICRO),
        },
        "kernel": kernel,
        "links": {
            **{name: _plain_link(getattr(cluster, name)) for name in ("intra", "inter")},
            "adapters": _plain(cluster.adapters, count=True),
            "message_overhead_us": _plain(cluster.message_overhead, _MICRO),
            "duplex": cluster.duplex,
            "one_port": cluster.one_port,
            "overlap_tax": _plain(cluster.overlap_tax),
        },
    }


def save_cluster(cluster: Cluster, path: Path) -> None:
    """Write a cluster's YAML file; `ClusterError` when that fails."""
    text = yaml.safe_dump(as_mapping(cluster), sort_keys=False, width=100, allow_unicode=True)
    try:
        path.write_text("# SPDX-License-Identifier: Apache-2.0\n" + text, encoding="utf-8")
    except OSError as failure:
        raise ClusterError(f"cluster file {path}: cannot be written: {failure}") from None


def _plain_link(link: Link) -> dict[str, Any]:
    return {
        "kind": link.kind.value,
        "line_rate_gbytes_per_s": _plain(link.line_rate, _GIGA),
        "share": _plain(link.share),
        "latency_us": _plain(link.latency, _MICRO),
    }


def _plain(figure: Figure | Figures, unit: float = 1.0, *, count: bool = False) -> dict[str, Any]:
    origin = {"basis": figure.basis.value, "source": figure.source}
    if isinstance(figure, Figure):
        value = int(figure.value) if count else _short(figure.value / unit)
        return {"value": value, **origin}
    return {
        "values": {key: _short(value / unit) for key, value in figure.values.items()},
        **origin,
    }


def _short(value: float) -> float:
    """Without the digits that a change of unit adds."""
    return float(f"{value:.12g}")
