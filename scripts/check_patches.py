# SPDX-License-Identifier: Apache-2.0
"""Does the patch for a fork of Megatron-LM fit it, and does what the patch switches on?

    python scripts/check_patches.py CHECKOUT       the patch of that release, tried on its scripts
    python scripts/check_patches.py --installed    the installed megatron-core: is all there that
                                                   the plugin replaces?
    python scripts/check_patches.py CHECKOUT --installed    both

A checkout is only read: the patch is tried on a copy of its pretraining scripts. Exit status: 0
everything fits, 1 something does not, 2 there is nothing to check.
"""

from __future__ import annotations

import argparse
import ast
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_seqpar import compatibility
from megatron_seqpar.errors import SeqParError

PATCHES = Path(__file__).resolve().parents[1] / "patches"
MAIN = re.compile(r"^if __name__ == ['\"]__main__['\"]:", re.MULTILINE)


def version_of(checkout: Path) -> str:
    """The version of megatron-core in a checkout, e.g. '0.18.2'; read, not imported.

    Raises SeqParError where there is none.
    """
    file = checkout / "megatron" / "core" / "package_info.py"
    if not file.is_file():
        raise SeqParError(f"{checkout} is no checkout of Megatron-LM: it has no {file.name}")
    values: dict[str, object] = {}
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    values[target.id] = node.value.value
    return ".".join(str(values[name]) for name in ("MAJOR", "MINOR", "PATCH"))


def scripts_of(patch: Path) -> list[str]:
    """Names of the scripts that a patch changes."""
    return re.findall(r"^\+\+\+ b/(.+)$", patch.read_text(encoding="utf-8"), re.MULTILINE)


def applies(patch: Path, checkout: Path, *, reverse: bool = False) -> str | None:
    """None where a patch applies (or, in reverse, has been applied), else what git says."""
    with tempfile.TemporaryDirectory() as copy:
        for name in scripts_of(patch):
            if (checkout / name).is_file():
                shutil.copy(checkout / name, copy)
        command = ["git", "apply", "--unidiff-zero", "--check", *(["--reverse"] * reverse)]
        done = subprocess.run(
            [*command, str(patch)], cwd=copy, capture_output=True, text=True, check=False
        )
    return None if done.returncode == 0 else done.stderr.strip()


def in_place(patch: Path, checkout: Path) -> str | None:
    """None where the lines would come first under `if __name__ == "__main__":`, else which do not.

    A zero-context diff applies anywhere with enough lines, so its line numbers are checked.
    """
    script, wrong = "", []
    for line in patch.read_text(encoding="utf-8").splitlines():
        if line.startswith("+++ b/"):
            script = line.removeprefix("+++ b/")
        elif found := re.match(r"@@ -(\d+),0 ", line):
            lines = (checkout / script).read_text(encoding="utf-8").splitlines()
            at = int(found[1])
            if at > len(lines) or MAIN.match(lines[at - 1]) is None:
                wrong.append(f'{script}:{at} is not its `if __name__ == "__main__":`')
    return "; ".join(wrong) or None


def by_hand(patch: Path, checkout: Path) -> str:
    """Where the lines belong in a checkout that the patch does not fit."""
    places = []
    for name in scripts_of(patch):
        file = checkout / name
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
        if found := MAIN.search(text):
            places.append(f"{name}:{text.count(chr(10), 0, found.start()) + 1}")
    return f"put its lines below {' and '.join(places)}" if places else "no such script is there"


def check_checkout(checkout: Path) -> bool:
    """Print whether the right patch fits; True if it does, or is in."""
    version = version_of(checkout)
    release = compatibility.nearest(version)
    patch = PATCHES / f"{release.tag}.diff"
    known = (
        "" if compatibility.is_known(version) else f", which is not known; nearest {release.tag}"
    )
    print(f"{checkout}: Megatron-LM with megatron-core {version}{known}")
    if applies(patch, checkout, reverse=True) is None:
        print(f"ok     {patch.name} is applied")
        return True
    problem = applies(patch, checkout) or in_place(patch, checkout)
    if problem is None:
        print(f"ok     {patch.name} applies to {', '.join(scripts_of(patch))}")
        return True
    print(f"FAILED {patch.name}: {problem}\n       {by_hand(patch, checkout)}")
    return False


def check_installed() -> bool:
    """Print whether the installed megatron-core has all that `install()` replaces."""
    from megatron_seqpar import integration

    try:
        integration.install()
    except SeqParError as error:
        print(f"FAILED {error}")
        return False
    from megatron.core import package_info

    from megatron_seqpar.integration.patch_points import PATCH_POINTS

    version = package_info.__version__
    release = compatibility.nearest(version)
    integration.uninstall()
    points = sum(release.family in point.versions for point in PATCH_POINTS)
    print(f"installed: megatron-core {version}; its scripts are patched by {release.tag}.diff")
    print(f"ok     install() replaces and restores the {points} patch points of {release.family}")
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("checkout", nargs="?", type=Path, help="a checkout of Megatron-LM")
    parser.add_argument("--installed", action="store_true", help="the installed megatron-core")
    options = parser.parse_args()
    if options.checkout is None and not options.installed:
        parser.print_usage(sys.stderr)
        print("name a checkout, --installed, or both", file=sys.stderr)
        return 2
    try:
        fits = options.checkout is None or check_checkout(options.checkout)
    except SeqParError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.installed:
        fits = check_installed() and fits
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())
