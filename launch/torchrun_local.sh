#!/usr/bin/env bash
# Run a script with N ranks on this machine.
set -euo pipefail

usage() {
  cat <<'USAGE'
usage: torchrun_local.sh N SCRIPT [ARGS...]

Runs SCRIPT with ARGS in N ranks on this machine. The rendezvous takes a free port of the loopback interface.
torchrun is taken from PATH.
USAGE
}

fail() {
  echo "torchrun_local.sh: error: $1" >&2
  exit 2
}

case "${1:-}" in
  -h | --help)
    usage
    exit 0
    ;;
  "") fail "N is not set: give the number of ranks, then the script (see --help)" ;;
  *[!0-9]* | 0) fail "N is $1: give a number of ranks from 1 up" ;;
esac
[[ $# -ge 2 ]] || fail "SCRIPT is not set: give the script to run after N"
ranks=$1
shift

# Divide the cores; left alone, torchrun would set 1 where there are several ranks, with a warning.
if [[ -z "${OMP_NUM_THREADS:-}" ]]; then
  cores=$(nproc)
  export OMP_NUM_THREADS=$((cores > ranks ? cores / ranks : 1))
fi

# Restarted ranks (PET_MAX_RESTARTS, with train.py --resume=auto) would find the addresses of those before them in the
# store that torchrun shares with its ranks, and often never meet (pytorch#135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# --local-addr: the machine's own name need not resolve.
exec torchrun --standalone --local-addr 127.0.0.1 --nproc-per-node "$ranks" "$@"
