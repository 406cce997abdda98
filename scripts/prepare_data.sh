#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Text to the indexed corpus that Megatron trains on, with any Hugging Face tokenizer, or one token
# a byte without one.
#
#   bash scripts/prepare_data.sh --output data/stdlib                 the text of Python's library
#   bash scripts/prepare_data.sh --input my.jsonl --output data/mine  one {"text": ...} a line
#   bash scripts/prepare_data.sh --input my.jsonl --output data/mine --tokenizer Qwen/Qwen2.5-7B
#
#   --input FILE        JSON lines; default: the source of Python's standard library
#   --key NAME          key of the text in each line                            (text)
#   --output PREFIX     PREFIX_NAME_document.bin and .idx are written, NAME being the key
#   --tokenizer NAME    a model's name, fetched with its own client, or a folder that holds one
#   --offline           use what is in the cache of fetched tokenizers, and no network
#   --fresh             write even if nothing changed
#   --dry-run           print the command and stop
#
# It ends with the arguments to train with. SEQPAR_PYTHON names the Python that has megatron_seqpar
# installed (default: python3); --tokenizer needs `pip install 'megatron_seqpar[hf]'`.

set -euo pipefail
# shellcheck source=scripts/cluster.sh
source "$(dirname "${BASH_SOURCE[0]}")/cluster.sh"

arguments=()
output=""
dry_run=0
while [[ $# -gt 0 ]]; do
    case "$1" in
    -h | --help) seqpar_help "${BASH_SOURCE[0]}"; exit 0 ;;
    --input) seqpar_needs_value "$1" $#; arguments+=(--input "$2"); shift 2 ;;
    --key) seqpar_needs_value "$1" $#; arguments+=(--json-key "$2"); shift 2 ;;
    --output) seqpar_needs_value "$1" $#; output="$2"; shift 2 ;;
    --tokenizer) seqpar_needs_value "$1" $#; arguments+=(--tokenizer "$2"); shift 2 ;;
    --offline) export HF_HUB_OFFLINE=1; shift ;;
    --fresh) arguments+=(--fresh); shift ;;
    --dry-run) dry_run=1; shift ;;
    *) seqpar_fail "$1: unknown; see --help" ;;
    esac
done
[[ -n "$output" ]] || seqpar_fail "--output is missing: folder and start of the files' names"
command=("$(seqpar_python)" -m megatron_seqpar prepare-data --output-prefix "$output")
seqpar_start "$dry_run" "${command[@]}" ${arguments[@]+"${arguments[@]}"}
