#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Build the source distribution and the wheel, and check what they say of themselves.
#
#   bash scripts/package.sh              into dist/
#   bash scripts/package.sh --install    and install the wheel into an environment of its own, with
#                                        all that it requires, and use it from an empty folder

set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

install=0
case "${1:-}" in
"") ;;
--install) install=1 ;;
*)
    sed -n '4,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 2
    ;;
esac

seqpar_setup package
cd "$SEQPAR_REPO"
rm -rf dist
seqpar_say "package: building"
"$SEQPAR_VENV/bin/python" -m build --outdir dist . >/dev/null
"$SEQPAR_VENV/bin/python" -m twine check --strict dist/*
[[ "$install" == 1 ]] || exit 0

scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
constraints="$scratch/constraints.txt"
seqpar_constraints "$SEQPAR_VENV/bin/python" 0 >"$constraints"
seqpar_say "package: installing the wheel elsewhere"
"$(seqpar_find_python)" -m venv "$scratch/venv"
"$scratch/venv/bin/python" -m pip install --quiet --constraint "$constraints" dist/*.whl
mkdir "$scratch/empty"
cd "$scratch/empty"
for arguments in "doctor --device cpu" "plan --model llama3-8b --cluster dgx-h100-x4" \
    "compare --help" "run --config pretrain-quickstart --dry-run"; do
    seqpar_say "package: megatron-seqpar $arguments"
    read -ra words <<<"$arguments"
    "$scratch/venv/bin/megatron-seqpar" "${words[@]}"
done
