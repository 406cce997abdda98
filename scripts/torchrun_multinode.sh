#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Start this machine's part of a run over several machines with plain torchrun. Give the same
# command on every machine; they meet at the first one.
#
#   bash scripts/torchrun_multinode.sh [OPTIONS] RUN...
#   bash scripts/torchrun_multinode.sh --nodes 4 --node-rank 0 --master-addr node0 \
#       --config configs/runs/pretrain-llama3-8b-128k.yaml --data-path /data/text_document
#
# RUN is what `megatron-seqpar run` takes: --config FILE and arguments, or a script and arguments.
#
#   --nodes N          machines                 (or NNODES, SLURM_JOB_NUM_NODES; 1)
#   --node-rank R      which one this is, from 0 on        (or NODE_RANK, SLURM_NODEID)
#   --master-addr A    name or address of machine 0        (or MASTER_ADDR)
#   --master-port P    a free port there        (or MASTER_PORT; 29500)
#   --nproc N          processes here, one a GPU    (or NPROC_PER_NODE; the GPUs that are here)
#   --log-dir DIR      also write each rank's output to files in DIR
#   --dry-run          print the command and stop
#
# SEQPAR_PYTHON names the Python that has megatron_seqpar installed (default: python3).

set -euo pipefail
# shellcheck source=scripts/cluster.sh
source "$(dirname "${BASH_SOURCE[0]}")/cluster.sh"

nodes="${NNODES:-${SLURM_JOB_NUM_NODES:-1}}"
rank="${NODE_RANK:-${SLURM_NODEID:-}}"
address="${MASTER_ADDR:-}"
port="${MASTER_PORT:-29500}"
nproc="${NPROC_PER_NODE:-}"
logs=""
dry_run=0
while [[ $# -gt 0 ]]; do
    case "$1" in
    -h | --help) seqpar_help "${BASH_SOURCE[0]}"; exit 0 ;;
    --nodes) seqpar_needs_value "$1" $#; nodes="$2"; shift 2 ;;
    --node-rank) seqpar_needs_value "$1" $#; rank="$2"; shift 2 ;;
    --master-addr) seqpar_needs_value "$1" $#; address="$2"; shift 2 ;;
    --master-port) seqpar_needs_value "$1" $#; port="$2"; shift 2 ;;
    --nproc) seqpar_needs_value "$1" $#; nproc="$2"; shift 2 ;;
    --log-dir) seqpar_needs_value "$1" $#; logs="$2"; shift 2 ;;
    --dry-run) dry_run=1; shift ;;
    --) shift; break ;;
    *) break ;;
    esac
done
[[ $# -gt 0 ]] || seqpar_fail "nothing to run; see --help"
seqpar_needs_count --nodes "$nodes"
seqpar_needs_count --master-port "$port"
if [[ -z "$nproc" ]]; then
    nproc="$(seqpar_gpus)"
    [[ "$nproc" -ge 1 ]] || seqpar_fail "no GPU was found here: say how many processes with --nproc"
fi
seqpar_needs_count --nproc "$nproc"

command=("${SEQPAR_PYTHON:-python3}" -m torch.distributed.run)
if [[ "$nodes" == 1 ]]; then
    command+=(--standalone)
else
    [[ "$rank" =~ ^[0-9]+$ ]] || seqpar_fail "--node-rank (or NODE_RANK): which of $nodes this is"
    [[ "$rank" -lt "$nodes" ]] || seqpar_fail "--node-rank $rank: of $nodes, use 0 to $((nodes - 1))"
    [[ -n "$address" ]] || seqpar_fail "--master-addr (or MASTER_ADDR): the name of machine 0"
    command+=("--nnodes=$nodes" "--node-rank=$rank")
    command+=("--master-addr=$address" "--master-port=$port")
fi
command+=("--nproc-per-node=$nproc")
[[ -z "$logs" ]] || command+=("--log-dir=$logs" --tee=3)
command+=(-m megatron_seqpar run "$@")
seqpar_start "$dry_run" "${command[@]}"
