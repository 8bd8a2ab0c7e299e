#!/usr/bin/env bash
# A network on one machine: N network namespaces on a bridge, each behind a token bucket.
#
#     netlab.sh [--name NAME] up N RATE [LATENCY]     netlab.sh up 4 200mbit
#     netlab.sh [--name NAME] run COMMAND...          once in each namespace, RANK etc. set
#     netlab.sh [--name NAME] down                    also when it is down already
#
# RATE limits what a rank sends and, separately, what it receives: kbit, mbit or gbit, as on the
# wire (Ethernet header included). LATENCY (us, ms or s) is one way. Networks of different NAMEs
# (default: lvx) stand side by side. Nothing is changed outside namespaces of its own: the bridge
# has one, too. It needs root, iproute2, and a kernel with veth, bridge and the tbf qdisc, for
# LATENCY also netem.
set -euo pipefail

name=lvx
subnet=10.77.0
# As clusters set it: here the processor cuts and joins packets, elsewhere a network card does.
mtu=9000
# Few packets, so that small messages do not pass at once: a quarter of a millisecond's worth, and
# one packet at least.
bursts_per_second=4000
burst_least=9100
queue_bytes=67108864 # like a switch with room: senders are slowed down, nothing is dropped
# The machine's own choice may differ, and with it what methods that send much get. Nothing is lost
# here, so this one grows until the wire is full and stays there; every kernel has it.
congestion_control=reno
pids=()

fail() {
  printf 'netlab: %s\n' "$@" >&2
  exit 2
}

usage() {
  sed -n '2,/^set /{/^# \{0,1\}/s///p}' "${BASH_SOURCE[0]}"
}

# Run a command; where it fails, say what it needs.
try() {
  local needs=$1 output
  shift
  output=$("$@" 2>&1) || fail "got '$output' from: $*" "It needs $needs."
}

check_machine() {
  [ "$(id -u)" = 0 ] || fail "got user $(id -un); making network namespaces needs root." \
    "Run it with sudo, or in a container that is --privileged."
  local tool
  for tool in ip tc; do
    command -v "$tool" >/dev/null || fail \
      "got no command '$tool'; it is part of iproute2 (Debian, Ubuntu: apt install iproute2)."
  done
}

namespaces() {
  ip netns list | awk -v name="$name" '$1 ~ "^" name "-([0-9]+|hub)$" { print $1 }'
}

# Ask processes (or, with a minus, process groups) to end, and end those that do not.
end() {
  local _
  [ $# -gt 0 ] || return 0
  kill -TERM -- "$@" 2>/dev/null || return 0
  for _ in {1..30}; do
    kill -0 -- "$@" 2>/dev/null || return 0
    sleep 0.1
  done
  kill -KILL -- "$@" 2>/dev/null || true
}

down() {
  local namespace
  # shellcheck disable=SC2046
  end $(for namespace in $(namespaces); do ip netns pids "$namespace"; done)
  for namespace in $(namespaces); do
    ip netns del "$namespace"
  done
}

clean_up_when_interrupted() { # $1: what ends it
  # shellcheck disable=SC2064
  trap "$1" EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM
  trap 'exit 129' HUP
}

bits_per_second() {
  [[ $1 =~ ^[0-9]+(\.[0-9]+)?[kmg]bit$ ]] || fail \
    "RATE: got '$1'; expected a number with its unit, kbit, mbit or gbit, such as 200mbit."
  local number=${1%bit}
  numfmt --from=si "${number^^}"
}

check_request() { # N RATE [LATENCY]
  local bits
  [ $# -ge 2 ] && [ $# -le 3 ] || fail "up: got $# words; expected N RATE [LATENCY]: up 4 200mbit"
  [[ $1 =~ ^[0-9]+$ ]] && [ "$1" -ge 1 ] && [ "$1" -le 250 ] || fail \
    "N: got '$1'; expected a number of namespaces from 1 to 250."
  bits=$(bits_per_second "$2")
  [ "$bits" -gt 0 ] || fail "RATE: got '$2'; expected more than 0."
  [[ -z ${3-} || $3 =~ ^[0-9]+(\.[0-9]+)?(us|ms|s)$ ]] || fail \
    "LATENCY: got '$3'; expected a time with its unit, us, ms or s, such as 1ms."
}

add_rank() { # number, latency, and tbf with its arguments
  local rank=$1 latency=$2 namespace="$name-$1" hub="$name-hub" place=root
  shift 2
  try "CAP_SYS_ADMIN, which containers have with --privileged" ip netns add "$namespace"
  try "a kernel with veth (CONFIG_VETH)" \
    ip -n "$hub" link add "port$rank" mtu "$mtu" type veth peer name eth0 mtu "$mtu" \
    netns "$namespace"
  # No address of its own making, so that nothing but the ranks' packets is counted.
  try "iproute2" ip -n "$namespace" link set eth0 addrgenmode none up
  try "iproute2" ip -n "$namespace" address add "$subnet.$((rank + 1))/24" dev eth0
  try "iproute2" ip -n "$namespace" link set lo up
  try "iproute2" ip -n "$namespace" route replace "$subnet.0/24" dev eth0 proto kernel \
    scope link src "$subnet.$((rank + 1))" congctl "$congestion_control"
  try "iproute2" ip -n "$hub" link set "port$rank" master bridge addrgenmode none up
  if [ -n "$latency" ]; then
    try "a kernel with the netem qdisc (CONFIG_NET_SCH_NETEM); without it leave LATENCY away" \
      tc -n "$namespace" qdisc add dev eth0 root handle 1: netem delay "$latency" limit 100000
    place="parent 1:1"
  fi
  # shellcheck disable=SC2086
  try "a kernel with the tbf qdisc (CONFIG_NET_SCH_TBF)" \
    tc -n "$namespace" qdisc add dev eth0 $place "$@"
  try "the same" tc -n "$hub" qdisc add dev "port$rank" root "$@"
}

up() {
  check_request "$@"
  check_machine
  [ -z "$(namespaces)" ] || fail "got a network '$name' that is up already;" \
    "end it with: netlab.sh --name $name down, or take another --name."
  local ranks=$1 latency=${3-} bits burst rank
  bits=$(bits_per_second "$2")
  burst=$((bits / 8 / bursts_per_second))
  ((burst > burst_least)) || burst=$burst_least
  clean_up_when_interrupted down
  try "CAP_SYS_ADMIN, which containers have with --privileged" ip netns add "$name-hub"
  try "a kernel with bridges (CONFIG_BRIDGE)" \
    ip -n "$name-hub" link add bridge type bridge forward_delay 0
  # Where `run` finds it again.
  try "iproute2" ip -n "$name-hub" link set bridge alias "$2${latency:+,$latency}" \
    addrgenmode none up
  for ((rank = 0; rank < ranks; rank++)); do
    add_rank "$rank" "$latency" tbf rate "${bits}bit" burst "$burst" limit "$queue_bytes"
  done
  try "CAP_SYS_ADMIN, which containers have with --privileged" ip netns exec "$name-0" true
  trap - EXIT
  echo "netlab: '$name' is up: $name-0 to $name-$((ranks - 1)), $subnet.1 to $subnet.$ranks," \
    "$2 each way${latency:+, $latency}"
}

end_run() {
  # A process that has just begun is not the leader of its group yet.
  [ ${#pids[@]} -eq 0 ] || end "${pids[@]/#/-}" "${pids[@]}"
}

run() {
  [ $# -ge 1 ] || fail "run: got no command; expected one: run python script.py"
  check_machine
  local ranks rank network port status=0
  ranks=$(namespaces | grep -c -v -- '-hub$' || true)
  [ "$ranks" -gt 0 ] || fail "got no network '$name' to run in; make one first: up 4 200mbit"
  network=$(ip -n "$name-hub" -o link show bridge | sed -n 's/.*alias \([^ \\]*\).*/\1/p')
  port=${MASTER_PORT:-$((20000 + RANDOM % 10000))}
  clean_up_when_interrupted end_run
  for ((rank = 0; rank < ranks; rank++)); do
    RANK=$rank WORLD_SIZE=$ranks LOCAL_RANK=0 LOCAL_SIZE=1 LOCAL_WORLD_SIZE=1 NODE_RANK=$rank \
      MASTER_ADDR=$subnet.1 MASTER_PORT=$port NETLAB=$network \
      GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0 \
      setsid ip netns exec "$name-$rank" "$@" &
    pids+=($!)
  done
  for ((rank = 0; rank < ranks && status == 0; rank++)); do
    wait -n || status=$?
  done
  exit "$status" # and end the other ranks, where one failed
}

if [ "${1-}" = --name ]; then
  name=${2-}
  shift $(($# < 2 ? $# : 2))
fi
[[ $name =~ ^[A-Za-z][A-Za-z0-9_]*$ ]] || fail \
  "--name: got '$name'; expected a letter, then letters, digits and underscores."
case ${1-} in
  up | run)
    "$@"
    ;;
  down)
    check_machine
    down
    ;;
  -h | --help | help)
    usage
    ;;
  *)
    usage >&2
    fail "got '${1-}'; expected up, run or down."
    ;;
esac
