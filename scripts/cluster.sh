# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash
#
# What the scripts that start runs share; source it.
#
#   SEQPAR_PYTHON   the Python that has megatron_seqpar installed   (default: python3; where that
#                   lacks it, the one of the repository's .venv)

# The repository; under sbatch, which runs a copy, SEQPAR_REPO or the folder it was submitted from.
seqpar_repository() {
    local here
    here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
    printf '%s\n' "${SEQPAR_REPO:-$here}"
}

# The Python to run the plugin's commands with; see the top.
seqpar_python() {
    local made
    made="$(seqpar_repository)/.venv/bin/python"
    if [[ -z "${SEQPAR_PYTHON:-}" && -x "$made" ]] && ! python3 -c 'import typer' 2>/dev/null; then
        printf '%s\n' "$made"
    else
        printf '%s\n' "${SEQPAR_PYTHON:-python3}"
    fi
}

seqpar_fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

# The comment at the top of script $1, as help.
seqpar_help() {
    sed -n '4,/^set -euo/{/^set -euo/d;/^#SBATCH/d;s/^# \{0,1\}//;p;}' "$1"
}

# $1: option, $2: how many words are left, it included. Fails where its value is missing.
seqpar_needs_value() {
    [[ "$2" -ge 2 ]] || seqpar_fail "$1 needs a value; see --help"
}

# $1: option, $2: its value, which must be a whole number of 1 or more.
seqpar_needs_count() {
    [[ "$2" =~ ^[1-9][0-9]*$ ]] || seqpar_fail "$1 $2: use a whole number of 1 or more"
}

# Print a command so that it can be pasted into a shell.
seqpar_print() {
    local word quoted line=""
    for word in "$@"; do
        printf -v quoted '%q' "$word"
        line+="${line:+ }$quoted"
    done
    printf '%s\n' "$line"
}

# $1: 1 to print the command that follows, 0 to become it.
seqpar_start() {
    local dry_run="$1"
    shift
    if [[ "$dry_run" == 1 ]]; then
        seqpar_print "$@"
    else
        exec "$@"
    fi
}

# GPUs of this machine that may be used; 0 where there are none.
seqpar_gpus() {
    local listed
    if [[ -n "${CUDA_VISIBLE_DEVICES+set}" ]]; then
        listed="${CUDA_VISIBLE_DEVICES//[^,]/}"
        [[ -n "$CUDA_VISIBLE_DEVICES" ]] && printf '%s\n' "$((${#listed} + 1))" || printf '0\n'
    elif command -v nvidia-smi >/dev/null 2>&1; then
        nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true
    else
        printf '0\n'
    fi
}
