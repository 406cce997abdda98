# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash
#
# Set-up shared by the scripts of this folder; source it, then call `seqpar_setup`.
#
#   SEQPAR_VENV         where the virtual environment lives          (default: <repo>/.venv)
#   SEQPAR_PYTHON       the Python to build it from                  (default: the first 3.12 found)
#   SEQPAR_SYSTEM_SITE  1: use the packages of that Python (torch of a container image) as they
#                       are; 0: install everything; auto: 1 in NVIDIA's PyTorch images, else 0
#   SEQPAR_PINS         versions in place of the tested ones: "megatron-core==0.18.2 typer==0.29.1"

SEQPAR_REPO="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
SEQPAR_VENV="${SEQPAR_VENV:-$SEQPAR_REPO/.venv}"
[[ "$SEQPAR_VENV" == /* ]] || SEQPAR_VENV="$PWD/$SEQPAR_VENV" # the scripts change folder later
SEQPAR_SYSTEM_SITE="${SEQPAR_SYSTEM_SITE:-auto}"
# One thread a rank: ranks on one machine otherwise fight for the same cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export PIP_DISABLE_PIP_VERSION_CHECK=1

seqpar_say() { printf '\n==> %s\n' "$*"; }

seqpar_fail() {
    printf '\nerror: %s\n' "$*" >&2
    exit 1
}

# True when $1 runs and is Python 3.12 (a pyenv shim may exist and yet not run).
seqpar_is_python312() {
    "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' >/dev/null 2>&1
}

# Print the path of a Python 3.12, or explain how to get one.
seqpar_find_python() {
    local candidate pyenv_root="${PYENV_ROOT:-$HOME/.pyenv}"
    if [[ -n "${SEQPAR_PYTHON:-}" ]]; then
        seqpar_is_python312 "$SEQPAR_PYTHON" ||
            seqpar_fail "SEQPAR_PYTHON=$SEQPAR_PYTHON is not a working Python 3.12"
        printf '%s\n' "$SEQPAR_PYTHON"
        return
    fi
    for candidate in python3.12 python3 python \
        "$pyenv_root"/versions/3.12*/bin/python3 \
        /opt/homebrew/bin/python3.12 /usr/local/bin/python3.12; do
        if seqpar_is_python312 "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    seqpar_fail "Python 3.12 was not found on PATH or under $pyenv_root/versions.
Install it in one of these ways and run this again:
  Ubuntu, Debian   sudo apt-get install python3.12 python3.12-venv
  Fedora, RHEL     sudo dnf install python3.12
  macOS            brew install python@3.12
  pyenv            pyenv install 3.12
  conda            conda create -n seqpar python=3.12
or name one: SEQPAR_PYTHON=/path/to/python3.12 bash $0"
}

# Print 1 when the packages of Python $1 are to be used as they are.
seqpar_system_site() {
    case "$SEQPAR_SYSTEM_SITE" in
    0 | 1) printf '%s\n' "$SEQPAR_SYSTEM_SITE" ;;
    auto)
        if [[ -n "${NVIDIA_PYTORCH_VERSION:-}" ]] && "$1" -c 'import torch' >/dev/null 2>&1; then
            printf '1\n'
        else
            printf '0\n'
        fi
        ;;
    *) seqpar_fail "SEQPAR_SYSTEM_SITE=$SEQPAR_SYSTEM_SITE: the accepted values are 0, 1 and auto" ;;
    esac
}

# Print a hash of all that decides what is installed, extras apart.
# $1: Python, $2: system site 0|1
seqpar_stamp() {
    # shellcheck disable=SC2086 # several pins are several words
    "$1" - "$SEQPAR_REPO" "$2" ${SEQPAR_PINS:-} <<'PYTHON'
import hashlib
import pathlib
import sys

repo, *choices = sys.argv[1:]
digest = hashlib.sha256("\0".join([sys.version, sys.base_prefix, repo, *choices]).encode())
for name in ("setup.py", "pyproject.toml", "requirements/constraints.txt"):
    digest.update((pathlib.Path(repo) / name).read_bytes())
print(digest.hexdigest())
PYTHON
}

# Print the constraints to install under. $1: the venv's Python, $2: system site 0|1.
# With the image's packages in use, each of them is pinned to the version it has, so that pip
# never replaces the image's torch or what was compiled against it.
seqpar_constraints() {
    # shellcheck disable=SC2086 # several pins are several words
    "$1" - "$SEQPAR_REPO/requirements/constraints.txt" "$2" ${SEQPAR_PINS:-} <<'PYTHON'
import importlib.metadata
import re
import sys

lines = [line.strip() for line in open(sys.argv[1], encoding="utf-8")]
pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
spelt = {re.sub(r"[-_.]+", "-", name).lower(): name for name in pins}
for pin in sys.argv[3:]:
    name, equals, version = pin.partition("==")
    if not equals or not version:
        sys.exit(f"SEQPAR_PINS: {pin}: write NAME==VERSION")
    pins[spelt.get(re.sub(r"[-_.]+", "-", name).lower(), name)] = version
if sys.argv[2] == "1":
    for package in importlib.metadata.distributions():
        name = re.sub(r"[-_.]+", "-", package.metadata["Name"] or "").lower()
        if name in spelt:
            pins[spelt[name]] = package.version
print("\n".join(f"{name}=={version}" for name, version in sorted(pins.items())))
PYTHON
}

# True when the environment was installed to the end with stamp $2. $1: the stamp's file
seqpar_is_current() {
    [[ -f "$1" && "$(cat "$1")" == "$2" ]] && seqpar_is_python312 "$SEQPAR_VENV/bin/python"
}

# Make the environment and install the package with its extras; does nothing when up to date.
# $1: extras to install (default: dev)
seqpar_setup() {
    local extras="${1:-dev}" python system_site stamp stamp_file constraints
    python="$(seqpar_find_python)" || exit 1
    system_site="$(seqpar_system_site "$python")" || exit 1
    stamp="$(seqpar_stamp "$python" "$system_site")"
    stamp_file="$SEQPAR_VENV/.seqpar-installed-$extras"
    if seqpar_is_current "$stamp_file" "$stamp"; then
        seqpar_say "environment: $SEQPAR_VENV is up to date"
        return
    fi

    if command -v flock >/dev/null 2>&1; then # two set-ups at once would tread on each other
        exec 9>"${TMPDIR:-/tmp}/seqpar-$(id -u)-$(cksum <<<"$SEQPAR_VENV" | cut -d' ' -f1).lock"
        flock -n 9 || {
            seqpar_say "environment: waiting for another set-up of $SEQPAR_VENV"
            flock 9
        }
        if seqpar_is_current "$stamp_file" "$stamp"; then
            exec 9>&-
            return
        fi
    fi
    mkdir -p "$(dirname "$SEQPAR_VENV")"
    if ! seqpar_is_python312 "$SEQPAR_VENV/bin/python" ||
        ! "$SEQPAR_VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        seqpar_say "environment: creating $SEQPAR_VENV from $python"
        local venv_options=(--clear)
        [[ "$system_site" == 1 ]] && venv_options+=(--system-site-packages)
        "$python" -m venv "${venv_options[@]}" "$SEQPAR_VENV" ||
            seqpar_fail "could not create $SEQPAR_VENV (on Debian and Ubuntu: sudo apt-get install python3.12-venv)"
    fi

    constraints="$SEQPAR_VENV/.seqpar-constraints.txt"
    seqpar_constraints "$SEQPAR_VENV/bin/python" "$system_site" >"$constraints" || exit 1
    seqpar_say "environment: installing megatron_seqpar[$extras] (torch is large: the first time takes minutes)"
    # In an image, PIP_CONSTRAINT holds the image's own pins: ours already carry those versions.
    env -u PIP_CONSTRAINT "$SEQPAR_VENV/bin/python" -m pip install \
        --constraint "$constraints" --editable "${SEQPAR_REPO}[$extras]" ||
        seqpar_fail "the installation stopped; run the same command again, it continues from there"
    local covered
    IFS=, read -ra covered <<<"$extras"
    [[ ",$extras," == *,dev,* ]] && covered+=(plot docs) # dev asks for all that these ask for
    [[ "$extras" == *,* ]] && covered+=("$extras")
    for extras in "${covered[@]}"; do
        printf '%s\n' "$stamp" >"$stamp_file.new"
        mv "$stamp_file.new" "$SEQPAR_VENV/.seqpar-installed-$extras"
    done
    exec 9>&-
    seqpar_say "environment: ready"
}
