#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Check and measure on one GPU all that needs one; OUTPUT is the folder of the results.
#
#   bash scripts/gpu_check.sh OUTPUT                   set up .venv as the other scripts do, check all
#   bash scripts/gpu_check.sh OUTPUT --only kernels    some parts; python scripts/gpu_check.py --help
#   bash scripts/gpu_check.sh --installed OUTPUT ...   no set-up: a Python that has torch, as it is
#   bash scripts/gpu_check.sh --wheels DIR OUTPUT ...  the same, with the wheels in DIR added
#
# The last two need no network. DIR holds wheels of what that Python lacks (megatron-core, for the
# part "training"); they are unpacked into a temporary folder. SEQPAR_PYTHON names the Python.

set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# Print the first Python of 3.11 or later that has torch.
find_python_with_torch() {
    local candidate
    for candidate in "${SEQPAR_PYTHON:-python3}" python python3.12; do
        if "$candidate" -c 'import sys, torch; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            command -v "$candidate"
            return
        fi
        [[ -n "${SEQPAR_PYTHON:-}" ]] && break
    done
    seqpar_fail "no Python 3.11 or later with torch was found (${SEQPAR_PYTHON:-python3, python, python3.12});
name one with SEQPAR_PYTHON, or leave --installed and --wheels out to set one up"
}

installed=0
wheels=""
while [[ $# -gt 0 ]]; do
    case "$1" in
    -h | --help)
        sed -n '4,13s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
        exit 0
        ;;
    --installed) installed=1 ;;
    --wheels)
        [[ $# -ge 2 && -d "$2" ]] || seqpar_fail "--wheels ${2:-}: no such folder"
        installed=1
        wheels="$2"
        shift
        ;;
    *) break ;;
    esac
    shift
done
[[ $# -ge 1 && "$1" != -* ]] || seqpar_fail "name the folder for the results: bash $0 OUTPUT"

if [[ "$installed" == 0 ]]; then
    seqpar_setup dev
    python="$SEQPAR_VENV/bin/python"
else
    python="$(find_python_with_torch)" || exit 1
    export PYTHONPATH="$SEQPAR_REPO${PYTHONPATH:+:$PYTHONPATH}"
    if [[ -n "$wheels" ]]; then
        site="$(mktemp -d)"
        trap 'rm -rf "$site"' EXIT
        seqpar_say "wheels of $wheels"
        "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" \
            "$wheels"/*.whl || seqpar_fail "the wheels in $wheels could not be unpacked"
        export PYTHONPATH="$PYTHONPATH:$site"
    fi
fi

seqpar_say "GPU check with $python"
"$python" "$SEQPAR_REPO/scripts/gpu_check.py" "$@"
