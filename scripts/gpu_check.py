# SPDX-License-Identifier: Apache-2.0
"""Check and measure everything that needs a GPU, on one GPU; needs torch and megatron-core only.

    python scripts/gpu_check.py OUTPUT                        everything, in at most nine minutes
    python scripts/gpu_check.py OUTPUT --quick                a smaller everything
    python scripts/gpu_check.py OUTPUT --only kernels,streams
    python scripts/gpu_check.py OUTPUT --device cpu           tries the check itself out

Every part runs in a process of its own (the parts about kernels: a process a kernel), so one that
crashes or hangs stops no other. OUTPUT gets gpu_check.json (all numbers, versions and hardware),
log.txt and two pictures; the table is printed last. Exit status: 0 all right, 1 something is wrong,
2 there is nothing to check. Parts: see benchmarks/gpu/__init__.py; "kernels" means correctness and
speed.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from rich.console import Console

from benchmarks.gpu import environment, report
from benchmarks.gpu.settings import Outcome, Scale, Settings
from megatron_seqpar.bench.result import write

# seconds that a part (or its run for one kernel) may take at full scale, in the order of running
PARTS = {
    "environment": 30.0,
    "correctness": 45.0,
    "streams": 100.0,
    "tiles": 75.0,
    "speed": 45.0,
    "processes": 75.0,
    "tests": 100.0,
    "training": 150.0,
}
BY_KERNEL = ("correctness", "speed")
GROUPS = {"kernels": BY_KERNEL}
GRACE = 20.0  # seconds beyond, for starting and for ending what was begun


def units(only: list[str], kernels: list[str]) -> list[tuple[str, str]]:
    """(part, kernel) of every run, in order; the kernel is "auto" for parts about none."""
    chosen = {part for name in only for part in GROUPS.get(name, (name,))}
    return [
        (part, kernel)
        for part in PARTS
        if not only or part in chosen
        for kernel in (kernels if part in BY_KERNEL else ["auto"])
    ]


def run_here(part: str, settings: Settings) -> dict[str, Any]:
    """Run one part in this process."""
    start = time.monotonic()
    try:
        outcome: Outcome = importlib.import_module(f"benchmarks.gpu.{MODULES[part]}").run(settings)
    except Exception as failure:  # whatever breaks in a part is that part's result
        text = (str(failure).splitlines() or [""])[0]
        outcome = Outcome("broke off", failures=[f"{type(failure).__name__}: {text}"])
        outcome.data["traceback"] = traceback.format_exc()
    return {**dataclasses.asdict(outcome), "seconds": time.monotonic() - start}


MODULES = {**{part: part for part in PARTS}, "tests": "suite"}


def run_apart(
    part: str, kernel: str, seconds: float, options: argparse.Namespace, log: Path, work: Path
) -> dict[str, Any]:
    """Run one part in a process of its own, and end it where it does not end by itself."""
    result = work / f"{part}-{kernel}.json"
    command = [
        sys.executable, __file__, str(options.output), "--unit", part, kernel, str(seconds),
        str(result), "--device", options.device, "--scale", options.scale, "--work", str(work),
        "--tests", *options.tests,
    ]  # fmt: skip
    start = time.monotonic()
    with log.open("a", encoding="utf-8") as file:
        file.write(f"\n==> {part} {kernel}\n")
        file.flush()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,  # so that what it started can be ended with it
        )  # fmt: skip
        try:
            status: int | str = process.wait(seconds + GRACE)
        except subprocess.TimeoutExpired:
            status = "no end in time"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if result.is_file():
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return found
    tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:]
    return {
        **dataclasses.asdict(Outcome("broke off", failures=[f"status: {status}"])),
        "seconds": time.monotonic() - start,
        "data": {"tail": tail},
    }


def judge(found: dict[str, Any]) -> str:
    """ "failed", "left out" (nothing was done) or "ok"."""
    if found["failures"]:
        return "failed"
    return "left out" if found["nothing"] else "ok"


def run_all(options: argparse.Namespace, console: Console) -> dict[str, dict[str, Any]]:
    """Every part, and what it found, by name ("speed:aten")."""
    device = torch.device(options.device)
    kernels = options.kernels or environment.found_kernels(device)
    log = options.output / "log.txt"
    log.unlink(missing_ok=True)
    deadline = time.monotonic() + 60 * options.minutes
    about = environment.describe(device)
    parts: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for part, kernel in units(options.only, kernels):
            name = f"{part}:{kernel}" if part in BY_KERNEL else part
            seconds = min(PARTS[part], deadline - time.monotonic() - GRACE)
            if seconds < 5:
                nothing = Outcome("no time was left", nothing=True)
                parts[name] = {**dataclasses.asdict(nothing), "seconds": 0.0}
            elif options.in_process:
                parts[name] = run_here(part, _settings(options, kernel, seconds, work))
            else:
                console.print(f"{name} (at most {seconds + GRACE:.0f} s) ...", highlight=False)
                parts[name] = run_apart(part, kernel, seconds, options, log, work)
            parts[name]["status"] = judge(parts[name])
            console.print(f"    {parts[name]['status']}: {parts[name]['says']}", markup=False)
            # after every part: a run that is cut short leaves what it has
            result = {**about, "scale": options.scale, "parts": parts}
            write(result, options.output / "gpu_check.json")
    return parts


def _settings(options: argparse.Namespace, kernel: str, seconds: float, work: Path) -> Settings:
    tests = tuple(options.tests)
    device = torch.device(options.device)
    return Settings(device, Scale(options.scale), seconds, work, kernel, tests)


def show(parts: dict[str, dict[str, Any]], output: Path, console: Console) -> None:
    """Pictures and tables."""
    about = parts.get("environment", {}).get("data", {}).get("gpu", {}).get("name", "")
    rows = report.speeds(parts)
    if rows:
        console.print(report.speed_table(rows))
        report.plot_speeds(rows, f"Attention kernels, bf16, {about}", output / "speed.png")
    tiles = parts.get("tiles", {}).get("data", {}).get("rows")
    if tiles:
        title = f"{tiles[0]['ranks']} ranks' tiles on one device, causal, {about}"
        report.plot_tiles(tiles, title, output / "tiles.png")
    console.print(report.summary(parts))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path, help="folder of all that is written")
    names = [*PARTS, *GROUPS]
    parser.add_argument("--only", default="", help=f"parts, with commas: {', '.join(names)}")
    parser.add_argument("--kernels", default="", help="with commas; default: all that are found")
    parser.add_argument("--quick", action="store_true", help="do less")
    parser.add_argument("--minutes", type=float, default=8.5, help="begin nothing after that")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--scale", choices=list(Scale), help=argparse.SUPPRESS)
    parser.add_argument("--tests", nargs="+", default=["tests"], help="what pytest is given")
    parser.add_argument("--in-process", action="store_true", help="no process for each part")
    parser.add_argument("--unit", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.only = [name for name in options.only.split(",") if name]
    options.kernels = [name for name in options.kernels.split(",") if name]
    for name in options.only:
        if name not in names:
            parser.error(f"--only {name}: the parts are {', '.join(names)}")
    if options.scale is None:
        options.scale = Scale.QUICK if options.quick else Scale.FULL
        if options.device == "cpu":
            options.scale = Scale.TINY
    return options


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 all right, 1 something wrong, 2 nothing to check."""
    options = parse(arguments)
    if options.unit is not None:
        part, kernel, seconds, result = options.unit
        found = run_here(part, _settings(options, kernel, float(seconds), options.work))
        write(found, Path(result))
        return 0
    console = Console(width=None if sys.stdout.isatty() else 150)
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            "gpu_check: no CUDA device is present, so nothing can be checked; "
            "--device cpu tries this script itself out",
            file=sys.stderr,
        )
        return 2
    options.output.mkdir(parents=True, exist_ok=True)
    parts = run_all(options, console)
    show(parts, options.output, console)
    console.print(f"{options.output / 'gpu_check.json'}", highlight=False)
    states = {part["status"] for part in parts.values()}
    if "failed" in states:
        return 1
    return 0 if "ok" in states else 2


if __name__ == "__main__":
    # more queues to the GPU than streams, so that streams depend on each other only as told;
    # read when CUDA starts, which is later
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    sys.exit(main())
