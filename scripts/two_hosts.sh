#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Run a command on two pretended hosts of this machine: two network namespaces joined by a link of
# limited speed. Linux, root, and the commands ip and tc; nothing is left behind on any exit.
#
#   bash scripts/two_hosts.sh [--rate 200mbit] [--no-pin] COMMAND...
#
# The command runs once on each host. In its words {node} becomes 0 or 1, {address} the first host's
# address, {port} a port there. In its environment:
#
#   SEQPAR_LINK                  the host's end of the link; its speed out of the host is limited
#   GLOO_SOCKET_IFNAME           the same, so that gloo talks over it
#   PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR, PET_MASTER_PORT
#                                what torchrun takes for --nnodes, --node-rank, ...
#
#   bash scripts/two_hosts.sh --rate 200mbit megatron-seqpar run --nproc 1 --torchrun-args \
#       "--nnodes 2 --node-rank {node} --master-addr {address} --master-port {port}" \
#       scripts/pretrain_gpt.py --sequence-parallel-size 2 ...
#
#   --rate RATE   speed of each direction, as tc writes it; without it the link is not limited, and
#                 whoever runs on a host may limit it:
#                 tc qdisc replace dev $SEQPAR_LINK root tbf rate RATE burst BYTES latency TIME
#   --no-pin      let both hosts use all cores; else host 0 has the first half of them and host 1 the
#                 second, where there are two or more
#
# Exit status: that of the first host to fail (then the other is stopped), else 0.

set -euo pipefail

NAME="seqpar$$"
MTU=9000
ADDRESS=10.231.77.1
PEER=10.231.77.2

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

rate="" pin=1
while [[ $# -gt 0 ]]; do
    case "$1" in
    --rate) [[ $# -ge 2 ]] || fail "--rate needs a value, such as 200mbit"; rate="$2"; shift 2 ;;
    --no-pin) pin=0; shift ;;
    --help) sed -n '4,/^set -euo/{/^set -euo/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    --) shift; break ;;
    -*) fail "$1: unknown; use --rate, --no-pin or --help" ;;
    *) break ;;
    esac
done
[[ $# -gt 0 ]] || fail "no command; see --help"
[[ "$(uname -s)" == Linux ]] || fail "network namespaces exist on Linux only"
[[ "$(id -u)" == 0 ]] || fail "making network namespaces needs root: sudo bash $0 ..."
for tool in ip tc; do
    command -v "$tool" >/dev/null || fail "$tool was not found; install iproute2"
done

hosts=()
clean_up() {
    local status=$? pid host
    trap - EXIT INT TERM HUP
    for pid in "${hosts[@]}"; do # each is the leader of its own process group
        kill -TERM -- "-$pid" 2>/dev/null || true
    done
    for pid in "${hosts[@]}"; do
        for _ in $(seq 50); do
            kill -0 -- "-$pid" 2>/dev/null || break
            sleep 0.1
        done
        kill -KILL -- "-$pid" 2>/dev/null || true
    done
    for host in 0 1; do # deleting a namespace deletes its end of the link, and so the other one
        ip netns delete "$NAME-$host" 2>/dev/null || true
    done
    exit "$status"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'exit 129' HUP

# what a run left that was killed with SIGKILL
for left in $(ip netns list | grep -oE '^seqpar[0-9]+-[01]' || true); do
    owner="${left#seqpar}"
    kill -0 "${owner%-*}" 2>/dev/null || ip netns delete "$left"
done

for host in 0 1; do
    ip netns add "$NAME-$host" || fail "this machine makes no network namespaces"
    ip -n "$NAME-$host" link set lo up
done
ip link add link0 netns "$NAME-0" mtu "$MTU" type veth peer name link1 netns "$NAME-1" ||
    fail "this machine makes no veth pairs"
ip -n "$NAME-1" link set link1 mtu "$MTU"
ip -n "$NAME-0" address add "$ADDRESS/30" dev link0
ip -n "$NAME-1" address add "$PEER/30" dev link1
for host in 0 1; do
    ip -n "$NAME-$host" link set "link$host" up
    if [[ -n "$rate" ]]; then
        tc -n "$NAME-$host" qdisc add dev "link$host" root tbf rate "$rate" burst 32kb latency 100ms ||
            fail "--rate $rate: tc does not take it; use a value such as 200mbit"
    fi
done

cores="$(nproc)"
port=$((20000 + $$ % 20000))
set -m # a process group for each host, to be stopped as one
for host in 0 1; do
    command=()
    for word in "$@"; do
        word="${word//\{node\}/$host}"
        word="${word//\{address\}/$ADDRESS}"
        command+=("${word//\{port\}/$port}")
    done
    place=()
    if [[ "$pin" == 1 && "$cores" -ge 2 ]] && command -v taskset >/dev/null; then
        half=$((cores / 2))
        place=(taskset -c "$((host * half))-$((host * half + half - 1))")
    fi
    ip netns exec "$NAME-$host" "${place[@]}" env \
        SEQPAR_LINK="link$host" GLOO_SOCKET_IFNAME="link$host" \
        PET_NNODES=2 PET_NODE_RANK="$host" PET_MASTER_ADDR="$ADDRESS" PET_MASTER_PORT="$port" \
        "${command[@]}" </dev/null &
    hosts+=($!)
done
set +m

running=("${hosts[@]}")
while [[ ${#running[@]} -gt 0 ]]; do
    status=0 ended=""
    wait -n -p ended "${running[@]}" || status=$?
    [[ "$status" == 0 ]] || exit "$status"
    still=()
    for pid in "${running[@]}"; do
        [[ "$pid" == "$ended" ]] || still+=("$pid")
    done
    running=("${still[@]}")
done
