# SPDX-License-Identifier: Apache-2.0
"""Single checks, on what they are given: no process is started."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from megatron_seqpar.doctor import Asked, Finding, Status, examine, tested
from megatron_seqpar.doctor.checks import (
    communication,
    folders,
    gpus,
    kernels,
    layout,
    limits,
    megatron,
    numerics,
    torch,
)
from megatron_seqpar.doctor.machine import Machine, _stages
from megatron_seqpar.simulate.topology import detect
from tests.simulate.nvml import Nvml

REPOSITORY = Path(__file__).resolve().parents[2]
TORCH = {"version": "2.11.0+cu130", "file": "torch", "cuda": "13.0", "gpus": [], "gloo": True,
         "nccl": "2.28.9"}  # fmt: skip
H100 = {"name": "NVIDIA H100 80GB HBM3", "capability": "9.0"}


def machine(environ: dict[str, str] | None = None, **stages: Any) -> Machine:
    """A machine where importing gave this."""
    made = Machine(environ if environ is not None else {"HOME": "/"})
    made.__dict__["probe"] = {"torch": TORCH, **stages}
    return made


def test_tested_versions_are_those_of_the_constraints() -> None:
    text = (REPOSITORY / "requirements" / "constraints.txt").read_text()
    for name in ("torch", "megatron-core"):
        assert f"\n{tested.pinned(name)}\n" in text
    assert f"on Python {tested.TESTED['python']}." in text


def test_known_families_are_those_of_the_patch_points() -> None:
    pytest.importorskip("megatron.training")
    from megatron_seqpar.integration.patch_points import PATCH_POINTS

    assert set(tested.MEGATRON_FAMILIES) == {v for point in PATCH_POINTS for v in point.versions}


def test_a_problem_must_have_a_fix() -> None:
    with pytest.raises(ValueError, match="no fix"):
        Finding("x", Status.PROBLEM, "bad")


@pytest.mark.parametrize(
    ("world", "tp", "sp", "pp"), [(1, 1, 1, 1), (8, 2, 2, 1), (16, 2, 2, 2), (24, 2, 3, 2)]
)
def test_groups_are_those_of_megatron(world: int, tp: int, sp: int, pp: int) -> None:
    parallel_state = pytest.importorskip("megatron.core.parallel_state")
    ranks = parallel_state.RankGenerator(
        tp=tp, ep=1, dp=world // (tp * sp * pp), pp=pp, cp=sp, order="tp-cp-ep-dp-pp"
    )
    names = {"TP": "tp", "SP": "cp", "DP": "dp", "PP": "pp"}
    theirs = {axis: sorted(ranks.get_ranks(name)) for axis, name in names.items()}
    assert {a: sorted(g) for a, g in layout.groups(world, tp, sp, pp).items()} == theirs


def test_layout_of_a_world() -> None:
    found = layout.check(Asked(world=8, tp=2, sp=2), machine())
    assert found.status is Status.OK
    assert found.text == "8 processes: TP 2 x SP 2 x PP 1, DP 2"
    assert found.details == (
        "TP: [0 1] [2 3] [4 5] [6 7]",
        "SP: [0 2] [1 3] [4 6] [5 7]",
        "DP: [0 4] [1 5] [2 6] [3 7]",
        "PP: each rank alone",
    )
    many = layout.check(Asked(world=1024, sp=64), machine())
    assert many.details[1].endswith("[448 449 ... 511] and 8 more")
    assert layout.check(Asked(sp=4), machine()).data["world"] == 4
    assert layout.check(Asked(nproc=3, sp=2), machine()).data["world"] == 2


@pytest.mark.parametrize(("world", "start"), [(6, "4 or 8"), (3, "4"), (9, "8 or 12")])
def test_a_world_that_does_not_divide_is_told_the_nearest(world: int, start: str) -> None:
    found = layout.check(Asked(world=world, tp=2, sp=2), machine())
    assert found.status is Status.PROBLEM
    assert f"{world} processes are not a multiple of TP 2 x SP 2 x PP 1 = 4" in found.text
    assert str(found.fix).startswith(f"start {start} processes: megatron-seqpar run --nproc ")


def test_nccl_wants_a_gpu_for_each_process() -> None:
    two = machine(torch={**TORCH, "gpus": [H100, H100]})
    assert communication.check(Asked(nproc=2), two).text == "NCCL 2.28.9, 2 processes"
    many = communication.check(Asked(nproc=4, device="cuda"), two)
    assert (many.status, many.fix) == (Status.PROBLEM, "megatron-seqpar run --nproc 2 ...")
    few = communication.check(Asked(nproc=4), two)
    assert few.text == "gloo, 4 processes on the CPU (GPUs for NCCL: 2)"
    none = communication.check(Asked(device="cuda"), machine())
    assert none.status is Status.PROBLEM
    assert str(none.fix).startswith("megatron-seqpar run --device cpu")
    built = machine(torch={**TORCH, "gloo": False})
    assert communication.check(Asked(), built).fix == (
        "python -m pip install --force-reinstall 'torch==2.11.0'"
    )


def test_a_hidden_gpu_is_told_apart_from_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Machine, "has_nvidia_device", property(lambda self: True))
    hidden = machine({"CUDA_VISIBLE_DEVICES": "9"})
    asked = Asked(device="cuda")
    assert communication.check(asked, hidden).fix == "unset CUDA_VISIBLE_DEVICES"
    assert torch.check(asked, hidden).fix == "unset CUDA_VISIBLE_DEVICES"
    cpu_only = machine({}, torch={**TORCH, "cuda": None})
    assert torch.check(asked, cpu_only).fix == (
        "python -m pip install --force-reinstall 'torch==2.11.0'"
    )
    old_driver = torch.check(asked, machine({}))
    assert old_driver.status is Status.PROBLEM
    assert "CUDA 13.0" in str(old_driver.fix)


@pytest.mark.parametrize(
    ("facts", "status", "text", "fix"),
    [
        ({}, "ok", "2.11.0", None),
        ({"version": "2.9.1+cpu"}, "problem", "2.9.1.* is imported from", "--force-reinstall"),
        ({"error": "ModuleNotFoundError: No module named 'torch'", "module": "torch"}, "problem",
         "is not installed", "pip install 'torch==2.11.0'"),
        ({"error": "OSError: libcudart.so.13"}, "problem", "imported: OSError: libcudart",
         "pip install --force-reinstall 'torch==2.11.0'"),
        ({"error": "importing it was killed by SIGILL"}, "problem", "SIGILL", "--force-reinstall"),
    ],
)  # fmt: skip
def test_torch(facts: dict[str, Any], status: str, text: str, fix: str | None) -> None:
    stage = facts if "error" in facts else {**TORCH, **facts}
    found = torch.check(Asked(), machine(torch=stage))
    assert found.status == status
    assert re.search(text, found.text)
    assert found.fix is None if fix is None else fix in str(found.fix)


@pytest.mark.parametrize(
    ("facts", "status", "fix"),
    [
        ({"version": "0.19.2", "training_error": None}, "ok", None),
        ({"version": "0.17.1", "training_error": None}, "ok", None),
        ({"version": "0.15.3", "training_error": None}, "warning", "'megatron-core==0.19.2'"),
        ({"version": "0.19.0", "training_error": "No module"}, "warning", "'megatron-core=="),
        ({"error": "ModuleNotFoundError: ...", "module": "megatron"}, "problem", "pip install 'm"),
        ({"error": "MissingSymbolError: megatron-core 0.30 has no x"}, "problem", "--force-re"),
    ],
)
def test_megatron(facts: dict[str, Any], status: str, fix: str | None) -> None:
    found = megatron.check(Asked(), machine(megatron=facts))
    assert found.status == status
    assert found.fix is None if fix is None else fix in str(found.fix)


def test_without_torch_others_wait_for_it() -> None:
    broken = machine(torch={"error": "ModuleNotFoundError: ...", "module": "torch"})
    for check in (megatron.check, kernels.check, communication.check, numerics.check):
        found = check(Asked(), broken)
        assert (found.status, found.fix) == (Status.ABSENT, "mend torch first")


def test_what_follows_from_a_cache_is_not_blamed_on_the_library(tmp_path: Path) -> None:
    """Importing Megatron makes torch.compile's cache folder."""
    file = tmp_path / "file"
    file.write_text("")
    facts = {"error": f"FileExistsError: [Errno 17] File exists: '{file}'"}
    fine = {"HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    broken = {**fine, "TORCHINDUCTOR_CACHE_DIR": str(file)}
    found = megatron.check(Asked(), machine(broken, megatron=facts))
    assert (found.status, found.fix) == (Status.ABSENT, "mend the folders first")
    assert megatron.check(Asked(), machine(fine, megatron=facts)).status is Status.PROBLEM


def test_kernels_say_why_not() -> None:
    cuda, cpu = "cuda bfloat16", "cpu float32"
    stage = {
        "backends": [
            {"name": "flash2", "unavailable": "flash-attn is not installed", "refuses": {}},
            {"name": "aten", "unavailable": None,
             "refuses": {cuda: None, cpu: "serves cuda tensors, not cpu"}},
            {"name": "reference", "unavailable": None, "refuses": {cuda: None, cpu: None}},
        ],
        "chosen": {cuda: "aten", cpu: "reference"},
    }  # fmt: skip
    found = kernels.check(Asked(), machine(kernels=stage))
    assert found.details == (
        "flash2: flash-attn is not installed",
        "aten: chosen for cuda bfloat16; serves cuda tensors, not cpu",
        "reference: serves cuda bfloat16 too; aten comes first; chosen for cpu float32",
    )
    assert found.status is Status.WARNING  # nobody wants the reference
    stage["chosen"] = {cuda: None, f"{cuda} error": "no attention kernel", cpu: "cpu"}
    assert kernels.check(Asked(), machine(kernels=stage)).status is Status.PROBLEM


def test_matrix_of_links() -> None:
    looked = machine()
    looked.__dict__["topology"] = detect(
        Nvml(["NVIDIA H100 80GB HBM3"] * 3, nvlinks={(0, 1)}), environ={}
    )
    found = gpus.check(Asked(), looked)
    assert found.status is Status.OK
    assert [line.split() for line in found.details] == [
        ["GPU0", "GPU1", "GPU2"],
        ["GPU0", "self", "nvlink", "pcie"],
        ["GPU1", "nvlink", "self", "pcie"],
        ["GPU2", "pcie", "pcie", "self"],
    ]
    assert len({len(line) for line in found.details}) == 1
    unseen = machine(torch={**TORCH, "gpus": [H100]})
    unseen.__dict__["topology"] = detect(Nvml([], fails={"nvmlInit": 9}), environ={})
    assert gpus.check(Asked(), unseen).status is Status.WARNING


def test_folders_that_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    environ = {"HOME": str(tmp_path), "TMPDIR": str(tmp_path), "USER": "me"}
    assert folders.check(Asked(), machine(environ)).status is Status.OK
    assert [path.name for path in tmp_path.iterdir()] == ["file"]  # nothing left behind
    found = folders.check(
        Asked(),
        machine({**environ, "TRITON_CACHE_DIR": str(file / "deep"), "TRITON_HOME": "elsewhere"}),
    )
    assert found.status is Status.PROBLEM
    assert found.text == f"TRITON_CACHE_DIR cannot be written: {file} is a file"
    assert re.fullmatch(r"export TRITON_CACHE_DIR=\S*triton_cache", str(found.fix))
    assert found.data["folders"]["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "torchinductor_me")


def test_little_shared_memory_has_its_fix(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = namedtuple("usage", ("total", "used", "free"))
    monkeypatch.setattr(limits, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(limits.shutil, "disk_usage", lambda path: usage(0, 0, 40 * 2**20))
    for there, status in (([], Status.WARNING), ([H100, H100], Status.PROBLEM)):
        found = limits.check(Asked(), machine(torch={**TORCH, "gpus": there}))
        assert found.status is status
        assert "40 MiB of shared memory are free" in found.text
        assert "--shm-size=8g" in str(found.fix)


def test_few_open_files_have_their_fix() -> None:
    """In a process of its own: the limit cannot be raised again."""
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (512, 512))\n"
        "from megatron_seqpar.doctor import Asked\n"
        "from megatron_seqpar.doctor.machine import Machine\n"
        "from megatron_seqpar.doctor.checks import limits\n"
        "found = limits.check(Asked(world=64), Machine())\n"
        "print(found.status, found.text, found.fix)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "may open 512 files, and a run wants some 2048" in done.stdout
    assert "ulimit -n 65536" in done.stdout


def test_ranks_that_hang_or_die_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def start(code: str) -> Any:
        errors = (tmp_path / f"errors {len(code)}").open("w+")
        return subprocess.Popen([sys.executable, "-c", code], stderr=errors), errors

    monkeypatch.setattr(numerics, "TEST_SECONDS", 0.2)
    stuck = start("import time; time.sleep(600)")
    assert numerics._wait([stuck]) == ["ranks 0 did not end in 0 s"]
    stuck[0].kill()
    stuck[0].wait()
    monkeypatch.setattr(numerics, "TEST_SECONDS", 60)
    dying = start("import os, sys; sys.exit('no such thing')")
    killed = start("import os; os.kill(os.getpid(), 9)")
    assert numerics._wait([dying]) == ["rank 0 failed: no such thing"]
    killed[0].wait()
    assert numerics._wait([killed]) == ["rank 0 was killed by SIGKILL"]


def test_a_probe_that_dies_leaves_what_it_said() -> None:
    said = '{"stage": "torch", "version": "2.11.0"}\nsome library\n'
    assert _stages(said, "was killed by SIGSEGV") == {
        "torch": {"version": "2.11.0"},
        "kernels": {"error": "importing it was killed by SIGSEGV"},
    }


def test_a_check_that_fails_is_a_problem_and_others_go_on() -> None:
    broken = Machine({})
    broken.__dict__["probe"] = None
    found = {finding.name: finding for finding in examine(Asked(), broken, ("numerics",))}
    assert found["torch"].status is Status.PROBLEM
    assert "the check itself failed: AttributeError" in found["torch"].text
    assert found["layout"].status is Status.OK


def test_the_doctor_itself_imports_nothing_that_may_be_broken() -> None:
    code = (
        "import sys, megatron_seqpar.doctor, megatron_seqpar.commands.doctor\n"
        "print([m for m in ('torch', 'numpy', 'megatron', 'pynvml') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
