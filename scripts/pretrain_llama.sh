#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Pretrain a Llama on long sequences, each split over the GPUs of a node. Llama 3 8B by default.
#
#   bash scripts/pretrain_llama.sh --mock                                  made-up tokens, to try
#   bash scripts/pretrain_llama.sh --data /data/text_document --tokenizer meta-llama/Meta-Llama-3-8B
#   bash scripts/pretrain_llama.sh --data ... --save /ckpt -- --eval-iters 10     more of Megatron's
#
#   --data PREFIX        corpus, as --data-path takes it     (or DATA_PATH)
#   --tokenizer NAME     its Hugging Face tokenizer, a name or a folder; bytes: one made without one
#                        (or TOKENIZER)
#   --mock               made-up tokens in the place of both
#   --model NAME         a model of configs/models or such a file        (llama3-8b)
#   --seq-length N       tokens of a sequence                            (131072)
#   --sp N               ranks that share a sequence                     (all processes of a node)
#   --tp N, --pp N       tensor- and pipeline-parallel sizes             (1, 1)
#   --micro-batch N      sequences at once                               (1)
#   --global-batch N     sequences of a step                             (32)
#   --steps N            training steps                                  (10000)
#   --lr X               highest learning rate                           (3e-4)
#   --recompute WHAT     none, mlp, attention-qkv or attention-output    (attention-output)
#   --save DIR           checkpoints; a run that finds one there goes on from it
#   --save-interval N    steps between checkpoints                       (500)
#   --nproc N            processes of a node, one a GPU                  (the GPUs that are here)
#   --script FILE        pretraining script                              (scripts/pretrain_gpt.py)
#   --device D           auto, cuda or cpu                               (cuda)
#   --dry-run            print the command and stop
#
# On several machines NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT say which, or SLURM's variables
# do; see torchrun_multinode.sh, which starts the processes. What follows -- goes to Megatron and
# wins over what is written here.

set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=scripts/cluster.sh
source "$here/cluster.sh"

data="${DATA_PATH:-}"
tokenizer="${TOKENIZER:-}"
mock=0
model=llama3-8b
seq_length=131072
sp="" tp=1 pp=1
micro_batch=1
global_batch=32
steps=10000
lr=3e-4
recompute=attention-output
save=""
save_interval=500
nproc="${NPROC_PER_NODE:-}"
script="$here/pretrain_gpt.py"
device=cuda
dry_run=0
while [[ $# -gt 0 ]]; do
    case "$1" in
    -h | --help) seqpar_help "${BASH_SOURCE[0]}"; exit 0 ;;
    --mock) mock=1; shift; continue ;;
    --dry-run) dry_run=1; shift; continue ;;
    --) shift; break ;;
    esac
    [[ "$1" == -* ]] || seqpar_fail "$1: unknown; see --help (Megatron's arguments follow --)"
    seqpar_needs_value "$1" $#
    case "$1" in
    --data) data="$2" ;;
    --tokenizer) tokenizer="$2" ;;
    --model) model="$2" ;;
    --seq-length) seq_length="$2" ;;
    --sp) sp="$2" ;;
    --tp) tp="$2" ;;
    --pp) pp="$2" ;;
    --micro-batch) micro_batch="$2" ;;
    --global-batch) global_batch="$2" ;;
    --steps) steps="$2" ;;
    --lr) lr="$2" ;;
    --recompute) recompute="$2" ;;
    --save) save="$2" ;;
    --save-interval) save_interval="$2" ;;
    --nproc) nproc="$2" ;;
    --script) script="$2" ;;
    --device) device="$2" ;;
    *) seqpar_fail "$1: unknown; see --help (Megatron's arguments follow --)" ;;
    esac
    shift 2
done

[[ -n "$nproc" ]] || nproc="$(seqpar_gpus)"
[[ "$nproc" -ge 1 ]] || seqpar_fail "no GPU was found here: say how many processes with --nproc"
for pair in "--nproc:$nproc" "--tp:$tp" "--pp:$pp" "--seq-length:$seq_length" "--steps:$steps" \
    "--micro-batch:$micro_batch" "--global-batch:$global_batch" "--save-interval:$save_interval"; do
    seqpar_needs_count "${pair%%:*}" "${pair#*:}"
done
if [[ -z "$sp" ]]; then
    ((nproc % (tp * pp) == 0)) ||
        seqpar_fail "--tp $tp x --pp $pp does not divide $nproc processes: say --sp"
    sp=$((nproc / (tp * pp)))
fi
seqpar_needs_count --sp "$sp"

arguments=(
    --tensor-model-parallel-size "$tp" --pipeline-model-parallel-size "$pp"
    --sequence-parallel-size "$sp"
    --seq-length "$seq_length" --max-position-embeddings "$seq_length"
    --micro-batch-size "$micro_batch" --global-batch-size "$global_batch"
    --train-iters "$steps"
    --lr "$lr" --min-lr 3e-5 --lr-decay-style cosine
    --lr-warmup-iters "$((steps >= 2000 ? 200 : steps / 10))"
    --weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1.0
    --bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
    --seqpar-recompute "$recompute" --seqpar-mlp-chunks auto --seqpar-loss-chunks auto
    --log-interval 1 --log-throughput
    --eval-interval 1000 --eval-iters 0
)
[[ "$tp" == 1 ]] || arguments+=(--sequence-parallel)
if [[ "$mock" == 1 ]]; then
    [[ -z "$data$tokenizer" ]] || seqpar_fail "--mock with --data or --tokenizer: give one of them"
    arguments+=(--mock-data --tokenizer-type NullTokenizer)
else
    [[ -n "$data" ]] || seqpar_fail "--data (or DATA_PATH) is missing; --mock tries without a corpus"
    [[ -n "$tokenizer" ]] || seqpar_fail "--tokenizer (or TOKENIZER) is missing: that of the corpus"
    read -ra prefixes <<<"$data"
    arguments+=(--data-path "${prefixes[@]}" --split "99,1,0")
    if [[ "$tokenizer" == bytes ]]; then
        arguments+=(--tokenizer-type NullTokenizer --vocab-size 256 --null-tokenizer-eod-id 0)
    else
        arguments+=(--tokenizer-type HuggingFaceTokenizer --tokenizer-model "$tokenizer")
    fi
fi
if [[ -n "$save" ]]; then
    arguments+=(--save "$save" --load "$save" --save-interval "$save_interval")
    arguments+=(--ckpt-format torch_dist)
fi

launch=(bash "$here/torchrun_multinode.sh" --nproc "$nproc")
[[ "$dry_run" == 0 ]] || launch+=(--dry-run)
exec "${launch[@]}" -- --device "$device" --model "$model" "$script" "${arguments[@]}" "$@"
