# SPDX-License-Identifier: Apache-2.0
"""Files that come with the package: in a wheel inside it, in the repository beside it."""

from __future__ import annotations

from pathlib import Path

from .errors import SeqParError

_PACKAGE = Path(__file__).resolve().parent
_ROOTS = (_PACKAGE, _PACKAGE.parent)  # of a wheel, of the repository


def pretraining_script() -> Path:
    """`scripts/pretrain_gpt.py`: a GPT on Megatron's own training loop, for runs that name none.

    Raises SeqParError where the installation has none.
    """
    return _found("scripts/pretrain_gpt.py", "--script: name a pretraining script")


def model_names() -> tuple[str, ...]:
    """Names of the model files that come with the package."""
    return _names("models")


def model_file(name_or_path: str | Path, option: str = "--model") -> Path:
    """The file of a model in configs/models by its name, or the path of another YAML file.

    Raises SeqParError, which names `option`, where there is no such file.
    """
    return _named("models", "model", name_or_path, option)


def run_names() -> tuple[str, ...]:
    """Names of the run files (pretrain-..., compare-..., sweep-...) that come with the package."""
    return _names("runs")


def run_file(name_or_path: str | Path, option: str = "--config") -> Path:
    """The file of a run in configs/runs by its name, or the path of another YAML file.

    Raises SeqParError, which names `option`, where there is no such file.
    """
    return _named("runs", "run", name_or_path, option)


def _names(kind: str) -> tuple[str, ...]:
    """Names of the files of one folder of configs."""
    folders = (root / "configs" / kind for root in _ROOTS)
    folder = next((folder for folder in folders if folder.is_dir()), None)
    return () if folder is None else tuple(sorted(path.stem for path in folder.glob("*.yaml")))


def _named(kind: str, what: str, name_or_path: str | Path, option: str) -> Path:
    if str(name_or_path) in _names(kind):
        return _found(f"configs/{kind}/{name_or_path}.yaml", option)
    path = Path(name_or_path)
    if path.is_file():
        return path
    raise SeqParError(
        f"{option} {name_or_path}: no such file; name one, or a {what} that comes with the "
        f"package: {', '.join(_names(kind))}"
    )


def _found(name: str, otherwise: str) -> Path:
    for root in _ROOTS:
        if (root / name).is_file():
            return root / name
    raise SeqParError(f"{name} does not come with this installation; {otherwise}")
