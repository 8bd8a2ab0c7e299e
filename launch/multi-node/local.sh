#!/usr/bin/env bash
# A run on several nodes, all of them on this machine: each node is a network namespace, behind a
# link of a rate of your choice, and has ranks on the CPU. To try out what a cluster will do.
#
#     sudo -E bash launch/multi-node/local.sh launch/finetune.py --model tiny ...
#     NODES=2 RANKS=2 RATE=200mbit,1ms bash launch/multi-node/local.sh SCRIPT ARGUMENTS...
#
# NODES (2) and RANKS of each (2), RATE (1gbit) with a latency where there is a comma. Needs root and
# iproute2, as ds_lvx/compare/netlab.sh says. The namespaces are gone afterwards, also after Ctrl-C.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
netlab="$here/../../ds_lvx/compare/netlab.sh"

[ $# -ge 1 ] || {
  echo "local.sh: got no script; expected one, and its arguments: launch/finetune.py --help" >&2
  exit 2
}
nodes=${NODES:-2} ranks=${RANKS:-2} rate=${RATE:-1gbit}
name=lvxnodes$$
folder=$(mktemp -d)
pid=
clean_up() {
  [ -z "$pid" ] || kill -TERM "$pid" 2>/dev/null || true
  bash "$netlab" --name "$name" down || true
  rm -rf "$folder"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

for ((node = 0; node < nodes; node++)); do
  echo "node-$node slots=$ranks"
done >"$folder/hostfile"

# One rank of the lab is one node here; DeepSpeed's launcher in it starts the node's ranks. The GPUs
# are every namespace's, so each node would take the same ones: hence the CPU.
export DS_ACCELERATOR=cpu
# shellcheck disable=SC2086
bash "$netlab" --name "$name" up "$nodes" ${rate/,/ }
# In the background, so that a signal to this script does not wait for the run to end.
bash "$netlab" --name "$name" run bash "$here/node.sh" "$folder/hostfile" "$@" &
pid=$!
wait "$pid"
