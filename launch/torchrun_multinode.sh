#!/usr/bin/env bash
# Run this machine's ranks of a job that spans several machines.
set -euo pipefail

usage() {
  cat <<'USAGE'
usage: torchrun_multinode.sh [OPTIONS] [--] SCRIPT [ARGS...]

Runs SCRIPT with ARGS in this node's ranks of a job over several nodes. Start it on every node. torchrun is taken
from PATH. An option may be given as an environment variable instead; the option wins.

required:
  --nodes N             NNODES           how many nodes take part
  --node-rank R         NODE_RANK        which of them this is, from 0; node 0 hosts the rendezvous
  --endpoint HOST:PORT  RDZV_ENDPOINT    node 0's address and a free port there; the same on every node

optional:
  --ranks-per-node N    RANKS_PER_NODE   ranks on each node (default 1)
  --rendezvous KIND     RDZV_BACKEND     static (default) or c10d; with c10d torchrun numbers the ranks itself
  --run-id ID           RDZV_ID          name of the job, the same on every node (default syncaccum)
  --interface NAME      INTERFACE        network interface for gloo and NCCL, such as eth0, where the machine's
                                         own name does not lead to the right one
  --local-addr ADDRESS  LOCAL_ADDR       this node's address as the others reach it, where its own name does not
                                         resolve; c10d between bare IP addresses needs it
  --help                                 print this

Two nodes, with two ranks each:
  torchrun_multinode.sh --nodes 2 --node-rank 0 --endpoint 10.0.0.1:29400 --ranks-per-node 2 launch/train.py
  torchrun_multinode.sh --nodes 2 --node-rank 1 --endpoint 10.0.0.1:29400 --ranks-per-node 2 launch/train.py
USAGE
}

fail() {
  echo "torchrun_multinode.sh: error: $1 (see --help)" >&2
  exit 2
}

nodes=${NNODES:-}
node_rank=${NODE_RANK:-}
endpoint=${RDZV_ENDPOINT:-}
ranks_per_node=${RANKS_PER_NODE:-1}
rendezvous=${RDZV_BACKEND:-static}
run_id=${RDZV_ID:-syncaccum}
interface=${INTERFACE:-}
local_addr=${LOCAL_ADDR:-}

while [[ $# -gt 0 ]]; do
  case "$1" in
    -h | --help)
      usage
      exit 0
      ;;
    --)
      shift
      break
      ;;
    --*=*)
      set -- "${1%%=*}" "${1#*=}" "${@:2}"
      continue
      ;;
    --nodes) variable=nodes ;;
    --node-rank) variable=node_rank ;;
    --endpoint) variable=endpoint ;;
    --ranks-per-node) variable=ranks_per_node ;;
    --rendezvous) variable=rendezvous ;;
    --run-id) variable=run_id ;;
    --interface) variable=interface ;;
    --local-addr) variable=local_addr ;;
    -*) fail "$1 is not an option" ;;
    *) break ;;
  esac
  [[ $# -ge 2 ]] || fail "$1 needs a value"
  printf -v "$variable" '%s' "$2"
  shift 2
done

[[ -n "$nodes" ]] || fail "the number of nodes is not set: give --nodes or NNODES"
[[ -n "$node_rank" ]] || fail "this node's rank is not set: give --node-rank or NODE_RANK"
[[ -n "$endpoint" ]] || fail "the rendezvous endpoint is not set: give --endpoint or RDZV_ENDPOINT"
[[ $# -ge 1 ]] || fail "the script is not set: give it after the options"
[[ "$nodes" =~ ^[1-9][0-9]*$ ]] || fail "--nodes is $nodes: give a number from 1 up"
[[ "$node_rank" =~ ^(0|[1-9][0-9]*)$ ]] || fail "--node-rank is $node_rank: give a number from 0 up"
((node_rank < nodes)) || fail "--node-rank is $node_rank: with --nodes $nodes the last one is $((nodes - 1))"
[[ "$ranks_per_node" =~ ^[1-9][0-9]*$ ]] || fail "--ranks-per-node is $ranks_per_node: give a number from 1 up"
[[ "$endpoint" =~ ^.+:[0-9]+$ ]] || fail "--endpoint is $endpoint: give HOST:PORT"

options=(--nnodes "$nodes" --nproc-per-node "$ranks_per_node")
case "$rendezvous" in
  static)
    options+=(--node-rank "$node_rank" --master-addr "${endpoint%:*}" --master-port "${endpoint##*:}")
    ;;
  c10d)
    # torchrun guesses the host from names; with bare addresses no node, or every node, would take the part.
    is_host=$((node_rank == 0 ? 1 : 0))
    options+=(--rdzv-backend c10d --rdzv-endpoint "$endpoint" --rdzv-id "$run_id" --rdzv-conf "is_host=$is_host")
    ;;
  *) fail "--rendezvous is $rendezvous: give static or c10d" ;;
esac

if [[ -n "$interface" ]]; then
  export GLOO_SOCKET_IFNAME=$interface NCCL_SOCKET_IFNAME=$interface
fi
if [[ -n "$local_addr" ]]; then
  options+=(--local-addr "$local_addr")
fi

# Divide the cores; left alone, torchrun would set 1 where there are several ranks, with a warning.
if [[ -z "${OMP_NUM_THREADS:-}" ]]; then
  cores=$(nproc)
  export OMP_NUM_THREADS=$((cores > ranks_per_node ? cores / ranks_per_node : 1))
fi

# Restarted ranks (PET_MAX_RESTARTS, with train.py --resume=auto) would find the addresses of those before them in the
# store that torchrun shares with its ranks, and often never meet (pytorch#135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

exec torchrun "${options[@]}" "$@"
