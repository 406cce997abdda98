# SPDX-License-Identifier: Apache-2.0
"""Rules of the repository as a whole: who may import whom, and what no file may hold."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "megatron_seqpar"
CODE = sorted(
    path
    for folder in ("megatron_seqpar", "scripts", "tests", "benchmarks")
    for path in (REPOSITORY / folder).rglob("*.py")
)
TEXT = sorted(
    path
    for path in [
        *CODE,
        *(REPOSITORY / "scripts").glob("*.sh"),
        *(REPOSITORY / "docs").rglob("*.md"),
        *(REPOSITORY / "configs").rglob("*.yaml"),
        *REPOSITORY.glob("*.md"),
        *REPOSITORY.glob("*.toml"),
        REPOSITORY / "setup.py",
        REPOSITORY / ".ci" / "run",
    ]
    if path != Path(__file__).resolve()
)


def imports(path: Path, code: str | None = None, *, typing: bool = True) -> Iterator[str]:
    """Dotted names that a file (or `code` in its place) imports, relative ones resolved.

    Without `typing`, those that only type checkers see are left out.
    """
    package = list(path.relative_to(REPOSITORY).with_suffix("").parts)[:-1]
    tree = ast.parse(code or path.read_text(encoding="utf-8"))
    if not typing:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and ast.unparse(node.test) in TYPING_TESTS:
                node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


TYPING_TESTS = ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def room_of(path: Path) -> str:
    """The part of the package a file belongs to: `attention`, `cli`, ..."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


# room: what it must not import (dotted prefixes; a room of the package by its bare name)
FORBIDDEN = {
    "attention": ("megatron", "memory", "planner", "integration", "launcher", "cpu_runtime"),
    "memory": ("megatron", "attention", "planner", "integration", "launcher", "cpu_runtime"),
    "planner": (
        "megatron",
        "torch",
        "attention",
        "memory",
        "integration",
        "launcher",
        "cpu_runtime",
        "commands",
    ),
    "simulate": (
        "megatron",
        "torch",
        "attention",
        "memory",
        "integration",
        "launcher",
        "cpu_runtime",
        "commands",
    ),
    "mfu": ("megatron", "torch", "attention", "memory", "planner", "integration", "launcher"),
    "experiments": ("megatron", "attention", "memory", "integration", "launcher", "cpu_runtime"),
    "compare": ("megatron", "attention", "memory", "integration", "launcher", "cpu_runtime"),
    "sweep": ("megatron", "attention", "memory", "integration", "launcher", "cpu_runtime"),
    "bench": ("megatron", "memory", "planner", "compare", "sweep", "doctor", "cpu_runtime"),
    "doctor": ("megatron", "integration", "memory", "planner"),
    "telemetry": ("megatron", "integration", "launcher", "attention", "memory"),
    "cpu_runtime": ("integration", "launcher", "attention", "memory", "planner"),
    "errors": ("megatron", "torch", "integration"),
    "config": ("megatron", "torch", "integration"),
    "data": ("integration", "launcher", "attention", "memory"),
}
# room: whose types it may name, under TYPE_CHECKING alone
MAY_NAME_TYPES_OF = {"simulate": ("attention",)}
MAY_IMPORT_INTEGRATION = {"integration", "cli", "launcher"}
RUN_IN_TRAINING = {PACKAGE / "bench" / "memory_rank.py"}  # scripts: the launcher runs, none imports


def breaches(name: str, forbidden: str) -> bool:
    if forbidden in ("megatron", "torch"):
        return name == forbidden or name.startswith(forbidden + ".")
    target = f"megatron_seqpar.{forbidden}"
    return name == target or name.startswith(target + ".")


@pytest.mark.parametrize("room", sorted(FORBIDDEN))
def test_doors(room: str) -> None:
    found = [
        f"{path.relative_to(REPOSITORY)} imports {name}"
        for path in CODE
        if PACKAGE in path.parents and room_of(path) == room
        for forbidden in FORBIDDEN[room]
        for name in imports(path, typing=forbidden not in MAY_NAME_TYPES_OF.get(room, ()))
        if breaches(name, forbidden)
    ]
    assert found == []


def test_only_the_launcher_and_the_command_line_import_integration() -> None:
    found = [
        f"{path.relative_to(REPOSITORY)} imports {name}"
        for path in CODE
        if PACKAGE in path.parents and room_of(path) not in MAY_IMPORT_INTEGRATION
        if path not in RUN_IN_TRAINING
        for name in imports(path)
        if breaches(name, "integration")
    ]
    assert found == []


def test_imports_are_seen_in_every_form() -> None:
    code = "from ..integration import x\ndef f():\n    import megatron.core as m\n"
    names = list(imports(PACKAGE / "attention" / "example.py", code))
    assert any(breaches(name, "integration") for name in names)
    assert any(breaches(name, "megatron") for name in names)


def test_imports_for_type_checkers_are_told_from_others() -> None:
    code = (
        "if TYPE_CHECKING:\n    from ..attention import x\n"
        "else:\n    import torch\n"
        "from ..memory import y\n"
    )
    path = PACKAGE / "simulate" / "example.py"
    for typing in (True, False):
        names = list(imports(path, code, typing=typing))
        assert any(breaches(name, "attention") for name in names) == typing
        assert any(breaches(name, "torch") for name in names)
        assert any(breaches(name, "memory") for name in names)


def test_simulating_needs_no_torch_and_no_attention() -> None:
    check = (
        "import sys, megatron_seqpar.simulate as s, megatron_seqpar.simulate.topology\n"
        "import megatron_seqpar.simulate.plot, megatron_seqpar.simulate.perfetto\n"
        "import megatron_seqpar.simulate.calibrate\n"
        "s.load_cluster('laptop')\n"
        "rooms = ('torch', 'numpy', 'matplotlib', 'megatron', 'megatron_seqpar.attention')\n"
        "print([m for m in rooms if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_importing_the_package_imports_nothing_heavy() -> None:
    rooms = "megatron_seqpar, megatron_seqpar.errors, megatron_seqpar.config"
    check = (
        f"import sys, {rooms}\n"
        "print([m for m in ('torch', 'megatron', 'megatron.core', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_source_files(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not text or text.startswith("# SPDX-License-Identifier: Apache-2.0\n")
    if PACKAGE in path.parents:
        assert len(text.splitlines()) <= 420, "one idea a file"


STRAY = {
    "unfinished work": re.compile(r"\b(TODO|FIXME|XXX|HACK)\b"),
    "stubs": re.compile(r"raise NotImplementedError"),
    "paths of one machine": re.compile(r"/(work|tmp)/[a-z]|/root/|/home/[a-z]"),
    "tests that give up": re.compile(r"pytest\.(skip|xfail)\(|mark\.xfail"),
    "swallowed errors": re.compile(r"except[^:\n]*:\s*\n\s*pass\b"),
    "conflict markers": re.compile(r"^(<<<<<<<|>>>>>>>) ", re.MULTILINE),
}


@pytest.mark.parametrize("kind", sorted(STRAY))
def test_no_stray_text(kind: str) -> None:
    found = []
    for path in TEXT:
        for match in STRAY[kind].finditer(path.read_text(encoding="utf-8")):
            found.append(f"{path.relative_to(REPOSITORY)}: {match.group(0)!r}")
    assert found == []


def test_version_is_in_the_changelog() -> None:
    import megatron_seqpar

    changelog = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## {megatron_seqpar.__version__}" in changelog


def test_the_license_is_whole() -> None:
    text = (REPOSITORY / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text


@pytest.mark.skipif(not (REPOSITORY / ".git").exists(), reason="not a git checkout")
def test_no_source_file_is_ignored_by_git() -> None:
    """A file that .gitignore hides works here and is missing in every clone."""
    listing = ["git", "ls-files", "--others", "--ignored", "--exclude-standard"]
    folders = ["megatron_seqpar", "tests", "scripts", "benchmarks", "configs", "docs", "patches"]
    found = subprocess.run(
        [*listing, "--", *folders], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert [name for name in found if not name.endswith(".pyc")] == []


def test_no_lone_sends_or_receives() -> None:
    """NCCL gives a lone send a communicator of its own for the pair, and can deadlock making it."""
    lone = {"send", "recv", "isend", "irecv"}
    for path in CODE:
        if PACKAGE not in path.parents:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = ast.unparse(node.func.value)
                called = node.func.attr in lone and owner in ("dist", "torch.distributed")
                assert not called, f"{path}:{node.lineno}: use batch_isend_irecv"


def test_every_test_that_the_regression_list_names_exists() -> None:
    text = (REPOSITORY / "docs" / "regressions.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)::([\w*]+)`", text)
    assert len(named) >= 12
    for file, test in named:
        source = (REPOSITORY / file).read_text(encoding="utf-8")
        assert test == "*" or f"def {test}(" in source, f"{file}::{test}"
