# SPDX-License-Identifier: Apache-2.0
"""The part of an experiment's YAML file that all its runs share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from megatron_seqpar.errors import SeqParError
from megatron_seqpar.experiments.job import Launch
from megatron_seqpar.shipped import model_file, model_names

Chosen = TypeVar("Chosen", bound="Setting")
_SHARE_OF_MEMORY = 0.8  # of the machine's, shared out over its ranks, when no limit is given


def _kebab(name: str) -> str:
    return name.replace("_", "-")


class Section(BaseModel):
    """A part of the file: unknown keys are errors, and names are written with dashes."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, alias_generator=_kebab, populate_by_name=True
    )


class LaunchSection(Section):
    """`launch:`; see `job.Launch`."""

    prefix: tuple[str, ...] = ()
    torchrun_args: str = ""
    ranks_per_node: int | None = Field(default=None, ge=1)


class Setting(Section):
    """What all runs of an experiment share.

    Attributes:
        model: a name in configs/models, or a file of flags, found from this file's folder
            or from the current one.
        changes: Megatron's model flags laid over it.
        data: `stdlib` (the text of Python's own library) or a JSON-lines file of {"text": ...}.
        json_key: the key of the text in that file.
        steps: training steps of a run; the first is not timed.
        global_batch_size, micro_batch_size: in sequences.
        device: auto, cpu or cuda.
        kernel: attention kernel of all runs but the stock ones; auto takes one that torch brings.
        arguments: more of Megatron's and the plugin's flags for every run.
        script: pretraining script; default: the scripts/pretrain_gpt.py of this project.
        launch: how processes are started where this machine's torchrun alone is not it.
        memory_limit_gib: what a rank may take on a CPU; default: its share of the memory.
        seconds: longest that a run may take; default: no limit.
        peak_tflops: peak of a device for MFU; default: published, or measured on a CPU.
    """

    model: Path
    changes: dict[str, Any] = Field(default_factory=dict)
    data: str = "stdlib"
    json_key: str = "text"
    steps: int = Field(default=6, ge=2)
    global_batch_size: int = Field(default=1, ge=1)
    seed: int = 1234
    device: Literal["auto", "cpu", "cuda"] = "auto"
    kernel: str = "auto"
    arguments: dict[str, Any] = Field(default_factory=dict)
    environment: dict[str, str] = Field(default_factory=dict)
    script: Path | None = None
    launch: LaunchSection = LaunchSection()
    memory_limit_gib: float | None = Field(default=None, gt=0)
    seconds: float | None = Field(default=None, gt=0)
    peak_tflops: float | None = Field(default=None, gt=0)

    @field_validator("environment", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return {k: str(v) for k, v in value.items()} if isinstance(value, dict) else value

    def launching(self) -> Launch:
        """How processes are started."""
        section = self.launch
        return Launch(section.prefix, section.torchrun_args, section.ranks_per_node)

    def limit_bytes(self, ranks: int, device: str) -> int:
        """Writable memory that a rank may take, 0 for no limit (a GPU has its own)."""
        if device != "cpu":
            return 0
        if self.memory_limit_gib is not None:
            return int(self.memory_limit_gib * 2**30)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return int(memory * _SHARE_OF_MEMORY / ranks)


def read_setting(kind: type[Chosen], path: Path) -> Chosen:
    """The experiment of a file. SeqParError names the file, the key and what is wrong with it."""
    try:
        setting = kind.model_validate(read_mapping(path))
    except ValidationError as error:
        raise SeqParError("\n".join(told(path, entry) for entry in error.errors())) from None
    named = str(setting.model) in model_names()  # one that comes with the package
    model = model_file(str(setting.model)) if named else beside(path, setting.model, "model")
    found = {"model": model}
    if setting.script is not None:
        found["script"] = beside(path, setting.script, "script")
    if setting.data != "stdlib":
        found["data"] = beside(path, Path(setting.data), "data")
    return setting.model_copy(
        update={**found, **({"data": str(found["data"])} if "data" in found else {})}
    )


def read_mapping(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file. SeqParError where it cannot be read or has none."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SeqParError(f"{path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SeqParError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise SeqParError(f"{path}: 'key: value' lines are expected, with at least 'model:'")
    return content


def beside(config: Path, path: Path, key: str) -> Path:
    """`path` from the config's folder, or else from the current one."""
    for folder in (config.parent, Path()):
        if (folder / path).is_file():
            return Path(os.path.normpath(folder / path))
    raise SeqParError(
        f"{config}: {key}: {path}: no such file, neither beside {config.name} nor here"
    )


def told(path: Path, entry: Any) -> str:
    """A validation error as a line: the file, the key, what stands there and what is wrong."""
    key = ".".join(_kebab(str(part)) for part in entry["loc"])
    if entry["type"] == "extra_forbidden":
        return f"{path}: {key}: unknown key"
    if entry["type"] == "missing":
        return f"{path}: {key}: missing"
    return f"{path}: {key}: {entry['input']!r}: {entry['msg']}"
