#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Everything that is checked without running anything.
#
#   bash scripts/lint.sh                        all of it
#   bash scripts/lint.sh shell docker           some of: python types shell docker workflows
#
# Runs every part even when an earlier one fails, and fails if any did.

set -uo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

for part in "$@"; do
    case "$part" in
    python | types | shell | docker | workflows) ;;
    *)
        sed -n '4,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
        exit 2
        ;;
    esac
done
[[ $# -gt 0 ]] || set -- python types shell docker workflows

seqpar_setup dev
cd "$SEQPAR_REPO" || exit 1
bin="$SEQPAR_VENV/bin"
status=0
check() {
    "$@" || {
        printf 'FAILED: %s\n' "$*" >&2
        status=1
    }
}

for part in "$@"; do
    seqpar_say "lint: $part"
    case "$part" in
    python)
        check "$bin/ruff" check .
        check "$bin/ruff" format --check .
        ;;
    types) check "$bin/python" -m mypy ;;
    shell) check "$bin/shellcheck" --external-sources scripts/*.sh scripts/*.sbatch .ci/run ;;
    docker)
        if [[ -x "$bin/hadolint" ]]; then
            check "$bin/hadolint" --failure-threshold info Dockerfile
        else
            echo "left out: hadolint comes for Linux on x86_64 only"
        fi
        ;;
    workflows)
        check "$bin/check-jsonschema" --builtin-schema vendor.github-workflows \
            .github/workflows/*.yml
        ;;
    esac
done
exit "$status"
