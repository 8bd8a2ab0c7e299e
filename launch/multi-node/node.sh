#!/usr/bin/env bash
# One node of a run on several, without ssh. Start it on every node, with that node's number:
#
#     NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash launch/multi-node/node.sh hosts launch/finetune.py ...
#     NODE_RANK=1 MASTER_ADDR=10.0.0.1 bash launch/multi-node/node.sh hosts launch/finetune.py ...
#
# The first argument is DeepSpeed's hostfile, the same on all nodes: a line `name slots=RANKS` a
# node, node 0 first. MASTER_ADDR is an address of node 0 that the others reach, MASTER_PORT
# (29500) a free port there. INTERFACE is this node's network interface; without it, the one that
# leads to MASTER_ADDR. Under Slurm: launch/slurm/. docs/multi-node.md has the details.
set -euo pipefail

fail() {
  printf 'node.sh: %s\n' "$@" >&2
  exit 2
}

# The interface by which packets to MASTER_ADDR leave; on node 0 itself, the one that has it.
interface_to() {
  local address found
  address=$(getent ahostsv4 "$1" | awk 'NR == 1 { print $1 }') || true
  [ -n "$address" ] || fail "MASTER_ADDR: got '$1', which has no address; expected node 0's."
  found=$(ip -4 -o address show | awk -v a="$address" '{ split($4, p, "/"); if (p[1] == a) print $2 }')
  [ -n "$found" ] || found=$(ip -4 -o route get "$address" | sed -n 's/.* dev \([^ ]*\).*/\1/p')
  printf '%s\n' "$found"
}

[ $# -ge 2 ] || fail "got $# arguments; expected a hostfile, a script and its arguments."
[ -f "$1" ] || fail "got '$1', which is no file; expected a hostfile."
[[ ${NODE_RANK-} =~ ^[0-9]+$ ]] || fail \
  "NODE_RANK: got '${NODE_RANK-}'; expected this node's number, from 0, in the hostfile's order."
nodes=$(grep -c '^[^#]*slots=' "$1") || true
[ "$NODE_RANK" -lt "$nodes" ] || fail \
  "NODE_RANK: got $NODE_RANK; expected less than $nodes, the lines 'name slots=RANKS' of $1."
[ -n "${MASTER_ADDR-}" ] || fail "MASTER_ADDR: got nothing; expected an address of node 0."
hostfile=$1
shift

interface=${INTERFACE-}
if [ -z "$interface" ]; then
  command -v ip >/dev/null || fail \
    "got no command 'ip' to find the interface with; name it: INTERFACE=eth0"
  interface=$(interface_to "$MASTER_ADDR")
fi
# Without these, gloo takes the interface of the host's name, often lo, and NCCL the first it finds.
export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$interface}"
export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-$interface}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

unset LOCAL_WORLD_SIZE  # of whoever started this script; the launcher says LOCAL_SIZE

exec deepspeed --hostfile "$hostfile" --no_ssh --node_rank "$NODE_RANK" \
  --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}" "$@"
