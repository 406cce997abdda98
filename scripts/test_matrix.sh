#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Run the tests that touch Megatron on every release of megatron-core that the plugin serves.
#
#   bash scripts/test_matrix.sh                  all of them, oldest first
#   bash scripts/test_matrix.sh 0.17.1 0.18.2    these
#   bash scripts/test_matrix.sh --list           what there is
#   bash scripts/test_matrix.sh --dry-run ...    print the commands and run nothing
#   bash scripts/test_matrix.sh ... -- ARGS      ARGS go to pytest, in place of the tests chosen here
#
# Each release gets an environment of its own, made once, kept, and made again when what it is made
# of changes. The releases, their Python and their torch stand in megatron_seqpar/compatibility.py.
# The table printed last is also written to the folder of the environments, as table.txt.
#
#   SEQPAR_MATRIX_DIR        where the environments live             (default: <repo>/.venv-matrix)
#   SEQPAR_MATRIX_KEEP       1: use the environments there are as they are
#   SEQPAR_PYTHON_3_11       the Python 3.11 to use, likewise 3_12   (default: the first one found)
#   MEGATRON_LM_PATH_0_16    a Megatron-LM checkout of that release, likewise 0_17, 0_18 and 0_19;
#                            or MEGATRON_LM_PATH where it is of the release at hand. Its own scripts
#                            are run and patched. megatron-core 0.16 has megatron.training only there:
#                            without it that release is tested without training.
#   PIP_EXTRA_INDEX_URL      https://download.pytorch.org/whl/cpu brings smaller torch builds

set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

MATRIX="${SEQPAR_MATRIX_DIR:-$SEQPAR_REPO/.venv-matrix}"
[[ "$MATRIX" == /* ]] || MATRIX="$PWD/$MATRIX"

# What is run, besides the integration: what the launcher and the CPU runtime do to Megatron, the
# patches, and training through the launcher on two ranks and more against one.
WITH_TRAINING=(tests/integration tests/cpu_runtime tests/patches)
WITH_TRAINING+=(tests/launcher/test_dataset_helpers.py)
WITH_TRAINING+=(tests/launcher/test_runs.py::test_help_after_the_script_is_the_scripts_in_one_process)
WITH_TRAINING+=(tests/launcher/test_runs.py::test_what_megatron_refuses_is_a_line_a_rank)
WITH_TRAINING+=("tests/training/test_parity.py::test_fifty_steps_are_the_same[sp2]")
WITH_TRAINING+=("tests/training/test_parity.py::test_fifty_steps_are_the_same[sp2-tp2-tpsp]")
WITH_TRAINING+=(tests/training/test_parity.py::test_fifty_steps_over_pipeline_stages)
CORE_ONLY=(tests/integration tests/patches)
# left out of the default run, and what most depends on the release
trains=tests/integration/test_training.py
SLOW=("$trains::test_the_stock_script_trains_like_stock_megatron" "$trains::test_hybrid_model")
SLOW+=("$trains::test_mixture_of_experts_and_multi_token_prediction")
SLOW+=("$trains::test_share_of_odd_length" "$trains::test_latent_attention")
SLOW+=(tests/integration/test_recompute_pipeline.py)

usage() {
    sed -n '4,25p' "${BASH_SOURCE[0]}" | sed 's/^# \{0,1\}//'
}

# Print the path of a Python of version $1, e.g. 3.11.
matrix_python() {
    local name="SEQPAR_PYTHON_${1/./_}" candidate root="${PYENV_ROOT:-$HOME/.pyenv}"
    for candidate in "${!name:-}" "python$1" "$root"/versions/"$1".*/bin/python3; do
        if [[ -n "$candidate" ]] &&
            "$candidate" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$1')" 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    seqpar_fail "no Python $1 was found; install it, or name one: $name=/path/to/python$1"
}

# Print the rows of the matrix: name, megatron-core, Python, torch, core only, megatron.training.
matrix_rows() {
    "$any_python" - "$SEQPAR_REPO" <<'PYTHON'
import sys

sys.path.insert(0, sys.argv[1])
from megatron_seqpar.compatibility import ENVIRONMENTS

for one in ENVIRONMENTS:
    release = one.release
    print(
        one.name, release.version, one.python, one.torch,
        "core" if one.core_only else "training",
        "package" if release.brings_training else "checkout",
    )
PYTHON
}

# Print the version of megatron-core in the checkout $1, nothing where there is none.
checkout_version() {
    "$any_python" - "$1" <<'PYTHON'
import pathlib
import re
import sys

file = pathlib.Path(sys.argv[1]) / "megatron/core/package_info.py"
text = file.read_text(encoding="utf-8") if file.is_file() else ""
numbers = [re.search(rf"^{name} = (\d+)", text, re.M) for name in ("MAJOR", "MINOR", "PATCH")]
print(".".join(found[1] for found in numbers if found))
PYTHON
}

# Print the checkout to use for megatron-core $1, nothing where there is none.
matrix_checkout() {
    local family="${1%.*}" name
    name="MEGATRON_LM_PATH_${family/./_}"
    local found="${!name:-}"
    if [[ -z "$found" && -n "${MEGATRON_LM_PATH:-}" ]]; then
        [[ "$(checkout_version "$MEGATRON_LM_PATH")" == "$family".* ]] && found="$MEGATRON_LM_PATH"
    elif [[ -n "$found" && "$(checkout_version "$found")" != "$family".* ]]; then
        seqpar_fail "$name=$found is no checkout of Megatron-LM with megatron-core $family"
    fi
    printf '%s\n' "$found"
}

# Print the constraints of an environment. $1: megatron-core, $2: torch
# With another torch than the project's, the libraries that come with torch are left to it.
matrix_constraints() {
    "$any_python" - "$SEQPAR_REPO/requirements/constraints.txt" "$1" "$2" <<'PYTHON'
import sys

file, megatron, torch = sys.argv[1:]
lines = [line.strip() for line in open(file, encoding="utf-8")]
pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
if pins["torch"] != torch:  # nor are the other pins known to suit it and its Python
    pins = {name: pins[name] for name in ("pytest", "ruff", "typer", "rich", "pydantic")}
pins |= {"megatron-core": megatron, "torch": torch}
print("\n".join(f"{name}=={version}" for name, version in sorted(pins.items())))
PYTHON
}

# Print a command as it could be typed, or run it. Uses: dry_run
matrix_do() {
    if [[ "$dry_run" == 1 ]]; then
        printf '%q ' "$@"
        printf '\n'
    else
        "$@"
    fi
}

# Make the environment in folder $1. $2: megatron-core, $3: Python, $4: torch, rest: more packages
matrix_setup() {
    local folder="$1" python constraints stamp
    python="$(matrix_python "$3")" || return 1
    constraints="$(matrix_constraints "$2" "$4")"
    stamp="$(cat "$SEQPAR_REPO/setup.py" - <<<"$constraints $python ${*:5}" | cksum)"
    if [[ -f "$folder/.seqpar-matrix" && "$(cat "$folder/.seqpar-matrix")" == "$stamp" ]]; then
        return
    fi
    [[ "${SEQPAR_MATRIX_KEEP:-0}" == 1 && -x "$folder/bin/python" ]] && return
    matrix_do "$python" -m venv --clear "$folder" || return 1
    if [[ "$dry_run" == 0 ]]; then
        printf '%s\n' "$constraints" >"$folder/.seqpar-constraints.txt"
    fi
    matrix_do env -u PIP_CONSTRAINT "$folder/bin/python" -m pip install --quiet \
        --constraint "$folder/.seqpar-constraints.txt" --editable "${SEQPAR_REPO}[dev]" "${@:5}" ||
        return 1
    [[ "$dry_run" == 1 ]] || printf '%s\n' "$stamp" >"$folder/.seqpar-matrix"
}

# Print "passed failed skipped seconds" of a pytest report in JUnit's form. $1: file
matrix_counts() {
    "$any_python" - "$@" <<'PYTHON'
import sys
import xml.etree.ElementTree as tree

total = dict.fromkeys(("tests", "bad", "skipped", "time"), 0.0)
for name in sys.argv[1:]:
    for suite in tree.parse(name).getroot().iter("testsuite"):
        total["tests"] += int(suite.get("tests", 0))
        total["bad"] += int(suite.get("failures", 0)) + int(suite.get("errors", 0))
        total["skipped"] += int(suite.get("skipped", 0))
        total["time"] += float(suite.get("time", 0))
passed = total["tests"] - total["bad"] - total["skipped"]
print(int(passed), int(total["bad"]), int(total["skipped"]), round(total["time"]))
PYTHON
}

# One row: make the environment, run the tests, print the row. $1..$6: as matrix_rows prints them
matrix_run() {
    local name="$1" version="$2" python="$3" torch="$4" kind="$5" brings="$6"
    local folder="$MATRIX/$name" checkout="" note="" status=0 counts
    local -a environment=("PYTHONPATH=$SEQPAR_REPO") first=() second=() more=()
    # what megatron.training of a checkout imports, and no package declares
    [[ "$brings" == package ]] || more=(six regex)
    seqpar_say "megatron-core $version, Python $python, torch $torch"
    matrix_setup "$folder" "$version" "$python" "$torch" ${more[@]+"${more[@]}"} || {
        matrix_table+="$(printf '%-14s %-7s %-8s %s' "$name" "$python" "$torch" 'no environment')"$'\n'
        return 1
    }
    if [[ "$kind" == training ]]; then
        checkout="$(matrix_checkout "$version")" || return 1
        if [[ -n "$checkout" ]]; then
            environment+=("MEGATRON_LM_PATH=$checkout")
            [[ "$brings" == package ]] || environment[0]+=":$checkout"
        elif [[ "$brings" == checkout ]]; then
            kind=core
            note="no checkout: nothing trained"
        else
            note="no checkout: its scripts not run"
        fi
    else
        note="core only"
    fi
    if [[ ${#pytest_arguments[@]} -gt 0 ]]; then
        first=("${pytest_arguments[@]}")
    elif [[ "$kind" == training ]]; then
        first=(-m "not slow" "${WITH_TRAINING[@]}")
        second=(-m slow "${SLOW[@]}")
    else
        first=(-m "not slow" "${CORE_ONLY[@]}")
    fi
    local -a pytest=(env -u MEGATRON_LM_PATH "${environment[@]}" "OMP_NUM_THREADS=$OMP_NUM_THREADS"
        "$folder/bin/python" -m pytest -q -p no:cacheprovider)
    local -a reports=("$folder/first.xml")
    if [[ "$dry_run" == 1 ]]; then
        matrix_do "${pytest[@]}" "--junitxml=$folder/first.xml" "${first[@]}"
        [[ ${#second[@]} -eq 0 ]] ||
            matrix_do "${pytest[@]}" "--junitxml=$folder/second.xml" "${second[@]}"
        return
    fi
    rm -f "$folder"/first.xml "$folder"/second.xml
    "${pytest[@]}" "--junitxml=$folder/first.xml" "${first[@]}" >"$folder/tests.log" 2>&1 || status=$?
    if [[ ${#second[@]} -gt 0 ]]; then
        reports+=("$folder/second.xml")
        "${pytest[@]}" "--junitxml=$folder/second.xml" "${second[@]}" >>"$folder/tests.log" 2>&1 ||
            status=$?
    fi
    grep -E '^(FAILED|ERROR) ' "$folder/tests.log" || true
    [[ "$status" == 0 ]] || printf 'all that was printed: %s\n' "$folder/tests.log"
    counts="$(matrix_counts "${reports[@]}")" || {
        tail -n 20 "$folder/tests.log"
        counts="- - - -"
    }
    # shellcheck disable=SC2086 # four words
    matrix_table+="$(printf '%-14s %-7s %-8s %7s %7s %8s %8s  %s' \
        "$name" "$python" "$torch" $counts "$note")"$'\n'
    return "$status"
}

dry_run=0 list=0 chosen=() pytest_arguments=()
while [[ $# -gt 0 ]]; do
    case "$1" in
    -h | --help)
        usage
        exit 0
        ;;
    --dry-run) dry_run=1 ;;
    --list) list=1 ;;
    --)
        shift
        pytest_arguments=("$@")
        break
        ;;
    -*) seqpar_fail "$1: the options are --dry-run, --list and --help; after -- pytest's" ;;
    *) chosen+=("$1") ;;
    esac
    shift
done

any_python="$(seqpar_find_python)" || exit 1
rows="$(matrix_rows)"
if [[ "$list" == 1 ]]; then
    printf '%s\n' "$rows" | cut -d' ' -f1
    exit 0
fi
for name in ${chosen[@]+"${chosen[@]}"}; do
    cut -d' ' -f1 <<<"$rows" | grep -qxF "$name" ||
        seqpar_fail "$name: the environments are $(cut -d' ' -f1 <<<"$rows" | paste -sd' ' -)"
done

cd "$SEQPAR_REPO"
[[ "$dry_run" == 1 ]] || mkdir -p "$MATRIX"
matrix_table="" overall=0
while read -r -u 3 -a row; do
    wanted=0
    [[ ${#chosen[@]} -gt 0 ]] || wanted=1
    for name in ${chosen[@]+"${chosen[@]}"}; do [[ "$name" == "${row[0]}" ]] && wanted=1; done
    [[ "$wanted" == 0 ]] || matrix_run "${row[@]}" || overall=1
done 3<<<"$rows"
if [[ "$dry_run" == 0 ]]; then
    seqpar_say "tests by release of megatron-core"
    {
        printf '%-14s %-7s %-8s %7s %7s %8s %8s  %s\n' \
            megatron-core Python torch passed failed skipped seconds ''
        printf '%s' "$matrix_table"
    } | tee "$MATRIX/table.txt"
fi
exit "$overall"
