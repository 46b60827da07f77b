#!/usr/bin/env bash
# Run a command on two nodes: network namespaces of this machine, joined by a virtual cable. As root.
#
#     tests/two_nodes.sh sh -c 'torchrun --nnodes 2 --node_rank $NODE_RANK \
#         --master_addr $MASTER_ADDR --master_port $MASTER_PORT --nproc_per_node 1 train.py'
#
# The nodes have the addresses 10.77.0.1 and 10.77.0.2 and see nothing else, not even this machine.
# The command finds NODE_RANK, MASTER_ADDR, MASTER_PORT and GLOO_SOCKET_IFNAME in its environment.
# Where it fails on one node the other gets three seconds, and this script that exit code.

set -u
[ $# -gt 0 ] || { echo "usage: $0 COMMAND [ARGUMENT]..." >&2; exit 2; }

name() { echo "sft$$-$1"; }

clean() {
    trap '' INT TERM HUP
    exec 2>/dev/null # bash tells of each process that is killed
    local signal node
    for signal in TERM KILL; do
        for node in 0 1; do
            ip netns pids "$(name $node)" | xargs -r kill -s $signal
        done
        for _ in $(seq 30); do # three seconds
            [ "$(ip netns pids "$(name 0)"; ip netns pids "$(name 1)")" ] || break
            sleep 0.1
        done
    done
    for node in 0 1; do
        ip netns del "$(name $node)" # and with it its end of the cable
    done
}
trap clean EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

set -e
for node in 0 1; do
    ip netns add "$(name $node)"
done
ip link add "$(name 0)" netns "$(name 0)" type veth peer name "$(name 1)" netns "$(name 1)"
for node in 0 1; do
    ip -n "$(name $node)" addr add "10.77.0.$((node + 1))/24" dev "$(name $node)"
    ip -n "$(name $node)" link set lo up
    ip -n "$(name $node)" link set "$(name $node)" up
done
set +e

export MASTER_ADDR=10.77.0.1 MASTER_PORT=29500
for node in 0 1; do
    NODE_RANK=$node GLOO_SOCKET_IFNAME=$(name $node) ip netns exec "$(name $node)" "$@" &
done
for _ in 0 1; do
    wait -n || { code=$?; sleep 3; exit $code; }
done
