#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Set up everything and run the tests.
#
#   bash scripts/test.sh                    the default run
#   bash scripts/test.sh --all              also the tests marked slow
#   bash scripts/test.sh tests/data -k mmap anything else goes to pytest
#
# Tests that run stock Megatron-LM scripts need a checkout of it: MEGATRON_LM_PATH=/path/to/it.

set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

select=(-m "not slow")
arguments=()
for argument in "$@"; do
    case "$argument" in
    -h | --help)
        sed -n '4,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
        exit 0
        ;;
    --all) select=() ;;
    *) arguments+=("$argument") ;;
    esac
done

seqpar_setup dev
cd "$SEQPAR_REPO"
seqpar_say "tests"
pytest=("$SEQPAR_VENV/bin/python" -m pytest ${select[@]+"${select[@]}"})
if [[ ${#arguments[@]} -gt 0 ]]; then
    exec "${pytest[@]}" "${arguments[@]}"
fi
# tests that compute in their own process share two workers; the others start ranks of their own,
# with time limits, and run one after the other
alone=(tests/attention tests/memory tests/simulate tests/commands tests/data tests/telemetry)
alone+=(tests/mfu tests/experiments tests/sweep tests/planner tests/doctor tests/bench tests/docs)
alone+=(tests/configs tests/scripts tests/package tests/test_repository.py)
status=0
"${pytest[@]}" -n 2 --dist loadfile "${alone[@]}" || status=$?
"${pytest[@]}" "${alone[@]/#/--ignore=}" || status=$?
exit "$status"
