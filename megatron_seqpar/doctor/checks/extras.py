# SPDX-License-Identifier: Apache-2.0
"""Which optional packages are there?"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, metadata

from ..finding import Asked, Finding, Status
from ..machine import Machine
from ..tested import PACKAGE, pip_install, requirements, unmet

GIVES = {
    "gpu": "GPU topology and telemetry",
    "plot": "pictures and TensorBoard",
    "te": "Transformer Engine's layers",
    "flash": "the flash2 attention kernel",
    "hf": "Hugging Face tokenizers",
}
ON_GPUS = ("gpu", "te", "flash")
_FOR_PROJECT_ITSELF = ("dev", "docs", "package", "all")


def check(asked: Asked, machine: Machine) -> Finding:
    """What each extra lacks: a problem where it is asked for, else only told.

    nvidia-ml-py beside GPUs is worth a warning: without it their links and load are not seen.
    """
    try:
        offered = metadata(PACKAGE).get_all("Provides-Extra") or []
    except PackageNotFoundError:
        return Finding("extras", Status.ABSENT, f"{PACKAGE} is not installed, nor are its extras")
    offered = [name for name in offered if name not in _FOR_PROJECT_ITSELF]
    unknown = [name for name in asked.extras if name not in offered]
    if unknown:
        return Finding(
            "extras",
            Status.PROBLEM,
            f"no such extra: {', '.join(unknown)}",
            fix=f"--extra with one of: {', '.join(offered)}",
        )
    missing: dict[str, str] = {}
    for name in offered:
        whys = [why for one in requirements(name) or () if (why := unmet(one)) is not None]
        if whys:
            missing[name] = "; ".join(whys)
    details = tuple(_line(name, missing.get(name), machine) for name in offered)
    data = {"missing": missing}
    needed = [name for name in asked.extras if name in missing]
    if needed:
        text = "; ".join(f"{name}: {missing[name]}" for name in needed)
        return Finding("extras", Status.PROBLEM, text, _install(needed), details, data)
    if machine.gpus and "gpu" in missing:
        text = f"{missing['gpu']}: {GIVES['gpu']} are missing"
        return Finding("extras", Status.WARNING, text, _install(["gpu"]), details, data)
    useful = [name for name in missing if machine.gpus or name not in ON_GPUS]
    if useful:
        text = "; ".join(f"{name}: {missing[name]}" for name in useful)
        return Finding("extras", Status.ABSENT, text, _install(useful), details, data)
    there = [name for name in offered if name not in missing]
    text = f"there: {', '.join(there) or 'none'}; this machine has no use for the others"
    if len(there) == len(offered):
        text = f"all there: {', '.join(there)}"
    return Finding("extras", Status.OK, text, details=details, data=data)


def _install(names: list[str]) -> str:
    return pip_install(f"{PACKAGE}[{','.join(names)}]")


def _line(name: str, missing: str | None, machine: Machine) -> str:
    gives = GIVES.get(name, "")
    if missing is None:
        return f"{name}: there ({gives})"
    idle = "" if machine.gpus or name not in ON_GPUS else ", of use on GPUs"
    return f"{name}: {missing} ({gives}{idle})"
