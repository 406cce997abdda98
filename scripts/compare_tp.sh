#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Train one model with its sequences split over ranks (SP) and with its weights split over them (TP,
# with and without TP-SP), on this machine's GPUs or over SLURM nodes, and compare: losses, step
# time, MFU, memory, bytes sent. `megatron-seqpar compare` does the work; this writes its file. Losses
# are compared with SP's.
#
#   bash scripts/compare_tp.sh                                  Llama 2 7B at 32K on this node's GPUs
#   bash scripts/compare_tp.sh --model llama2-33-heads --seq-length 65536
#   bash scripts/compare_tp.sh --nodes 2 --srun "srun --partition=gpu"     in a SLURM allocation
#   bash scripts/compare_tp.sh --model compare --nproc 2 --seq-length 2048 --device cpu   no GPU
#
#   --model NAME       a model of configs/models                        (llama2-7b)
#   --layers N         with this many of its layers                     (all)
#   --seq-length N     tokens of a sequence; several with commas        (32768)
#   --nproc N          processes of a node, one a GPU                   (the GPUs that are here)
#   --nodes N          nodes of a SLURM allocation                      (1)
#   --srun COMMAND     how a command is started once on each node       (srun)
#   --steps N          training steps of each way, the first untimed    (8)
#   --batch N          sequences of a step                              (1)
#   --recompute WHAT   in every way: none, selective, full, attention-output ...    (full)
#   --device D         auto, cuda or cpu                                (auto)
#   --output DIR       rows, logs, table and picture      (runs/compare/tp-MODEL)
#   --dry-run          print the file and the command of every way, and stop
#
# Run again, it goes on where it was.

set -euo pipefail
# shellcheck source=scripts/cluster.sh
source "$(dirname "${BASH_SOURCE[0]}")/cluster.sh"

model=llama2-7b
layers=""
seq_length=32768
nproc=""
nodes=1
srun=srun
steps=8
batch=1
recompute=full
device=auto
output=""
dry_run=0
while [[ $# -gt 0 ]]; do
    case "$1" in
    -h | --help) seqpar_help "${BASH_SOURCE[0]}"; exit 0 ;;
    --dry-run) dry_run=1; shift; continue ;;
    esac
    [[ "$1" == --* ]] || seqpar_fail "$1: unknown; see --help"
    seqpar_needs_value "$1" $#
    case "$1" in
    --model) model="$2" ;;
    --layers) layers="$2"; seqpar_needs_count "$1" "$2" ;;
    --seq-length) seq_length="$2" ;;
    --nproc) nproc="$2"; seqpar_needs_count "$1" "$2" ;;
    --nodes) nodes="$2"; seqpar_needs_count "$1" "$2" ;;
    --srun) srun="$2" ;;
    --steps) steps="$2"; seqpar_needs_count "$1" "$2" ;;
    --batch) batch="$2"; seqpar_needs_count "$1" "$2" ;;
    --recompute) recompute="$2" ;;
    --device) device="$2" ;;
    --output) output="$2" ;;
    *) seqpar_fail "$1: unknown; see --help" ;;
    esac
    shift 2
done
[[ "$seq_length" =~ ^[1-9][0-9]*(,[1-9][0-9]*)*$ ]] ||
    seqpar_fail "--seq-length $seq_length: use a number of tokens, or several with commas"
[[ -n "$nproc" ]] || nproc="$(seqpar_gpus)"
[[ "$nproc" -ge 1 ]] || seqpar_fail "no GPU was found here: say how many processes with --nproc"
ranks=$((nodes * nproc))
[[ "$ranks" -ge 2 ]] || seqpar_fail "one process has nothing to split: use --nproc 2 or more"
repository="$(seqpar_repository)"
output="${output:-runs/compare/tp-$(basename "$model" .yaml)}"

# Weights and gradients are whole on every SP rank, so the optimizer's state must be shared out.
file="$(
    cat <<YAML
model: $model
seq-length: [${seq_length//,/, }]
ranks: $ranks
steps: $steps
global-batch-size: $batch
recompute: $recompute
device: $device
arguments: {use-distributed-optimizer: true}
YAML
)"
[[ -z "$layers" ]] || file+=$'\n'"changes: {num-layers: $layers}"
file+=$'\nways:'
file+=$'\n'"  - {sp: $ranks}"
if ((nproc % 2 == 0 && ranks > 2)); then
    file+=$'\n'"  - {tp: 2, sp: $((ranks / 2)), tp-sp: true}"
fi
if [[ "$nodes" -gt 1 ]]; then # TP belongs inside a node, and SP goes over them
    file+=$'\n'"  - {tp: $nproc, sp: $nodes, tp-sp: true}"
fi
file+=$'\n'"  - {tp: $ranks}"$'\n'"  - {tp: $ranks, tp-sp: true}"
if [[ "$recompute" =~ ^(none|selective|full)$ ]]; then # stock Megatron has no other
    file+=$'\n'"  - {tp: $ranks, tp-sp: true, kernel: stock}"
fi
if [[ "$nodes" -gt 1 ]]; then
    [[ -n "${SLURM_JOB_NODELIST:-}" || "$dry_run" == 1 ]] ||
        seqpar_fail "--nodes $nodes: run it in a SLURM allocation (salloc --nodes $nodes ...)"
    first=FIRST_NODE
    if [[ -n "${SLURM_JOB_NODELIST:-}" ]]; then
        names="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
        first="${names%%$'\n'*}"
    fi
    port=$((20000 + ${SLURM_JOB_ID:-0} % 20000))
    read -ra start <<<"$srun --nodes=$nodes --ntasks=$nodes --ntasks-per-node=1"
    listed="$(printf '%s, ' "${start[@]}")"
    meeting="--nnodes $nodes --rdzv-backend c10d --rdzv-endpoint $first:$port --rdzv-id $port"
    file+=$'\nlaunch:\n'"  prefix: [${listed%, }]"
    file+=$'\n'"  torchrun-args: \"$meeting\""
    file+=$'\n'"  ranks-per-node: $nproc"
fi

command=("$(seqpar_python)" -m megatron_seqpar compare)
if [[ "$dry_run" == 1 ]]; then
    path="$(mktemp --suffix=.yaml)"
    trap 'rm -f "$path"' EXIT
    printf '%s\n' "$file" | tee "$path" | sed 's/^/# /'
    cd "$repository"
    "${command[@]}" "$path" --output "$output" --dry-run
    exit 0
fi
mkdir -p "$output"
printf '%s\n' "$file" >"$output/compare.yaml"
exec "${command[@]}" "$output/compare.yaml" --output "$output"
