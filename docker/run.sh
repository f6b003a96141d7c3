#!/usr/bin/env bash
# The multi-node tests and a short training on a cluster of containers; with a command, that command on it instead.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'USAGE'
usage: run.sh [OPTIONS] [-- SCRIPT [ARGS...]]

Builds the image of a node, and in clusters of containers, with static and with c10d rendezvous, runs
  - the tests of tests/multinode/cluster, in every rank,
  - a short training, whose weights must be those of as many ranks in one container, bit for bit.
Every line is printed with the node it is from, and a table at the end says how each job went. The first job that
fails on any node is the last one. With SCRIPT, torchrun runs that, with ARGS, instead.

  --nodes N            containers in the cluster, 1 to 4; may be repeated (default: 2, then 3)
  --ranks-per-node N   ranks in each container (default 2)
  --rendezvous KIND    static or c10d; may be repeated (default: both)
  --timeout SECONDS    of a job, after which it has failed (default 180)
  --help               print this

  SYNCACCUM_IMAGE, BASE                        see docker/build.sh --help
  SYNCACCUM_NODE_CPUS, SYNCACCUM_NODE_MEMORY   limits of a container (default: a core for each rank, 4g)

Exit status: 0 all passed; 1 a job failed; 2 it could not start; 130 interrupted. Containers, network and volume
are removed in any case.
USAGE
}

# shellcheck source=docker/common.sh
source docker/common.sh

sizes=()
rendezvous=()
ranks_per_node=2
timeout=180
while [[ $# -gt 0 ]]; do
  case "$1" in
    -h | --help)
      usage
      exit 0
      ;;
    --)
      shift
      [[ $# -ge 1 ]] || fail "there is no SCRIPT after --: give one, or leave -- out (see --help)"
      break
      ;;
    --*=*)
      set -- "${1%%=*}" "${1#*=}" "${@:2}"
      continue
      ;;
    --nodes | --ranks-per-node | --rendezvous | --timeout) [[ $# -ge 2 ]] || fail "$1 needs a value (see --help)" ;;
    *) fail "$1 is not an option; a script comes after -- (see --help)" ;;
  esac
  case "$1 $2" in
    --nodes\ [1-4]) sizes+=("$2") ;;
    --nodes\ *) fail "--nodes is $2: docker/compose.yaml has four, give 1 to 4" ;;
    --rendezvous\ static | --rendezvous\ c10d) rendezvous+=("$2") ;;
    --rendezvous\ *) fail "--rendezvous is $2: give static or c10d" ;;
    *\ | *\ 0* | *\ *[!0-9]*) fail "$1 is ${2:-empty}: give a number from 1 up" ;;
    --ranks-per-node\ *) ranks_per_node=$2 ;;
    --timeout\ *) timeout=$2 ;;
  esac
  shift 2
done
((${#sizes[@]})) || sizes=(2 3)
((${#rendezvous[@]})) || rendezvous=(static c10d)

need_engine
docker/compose.sh version >/dev/null || exit 2

# A name of its own for each run, so that several can go on side by side.
COMPOSE_PROJECT_NAME=syncaccum-$$-$(date +%s)
export COMPOSE_PROJECT_NAME
# A core for each rank, if there are so many; more threads would only change how sums are rounded.
cores=$(nproc)
export SYNCACCUM_NODE_CPUS=${SYNCACCUM_NODE_CPUS:-$((cores < ranks_per_node ? cores : ranks_per_node))}
settings=(--env "RANKS_PER_NODE=$ranks_per_node" --env OMP_NUM_THREADS=1)
# shellcheck disable=SC2016 # the placeholder is torchrun's
settings+=(--env 'TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE=rank ${rank} | ')
# With c10d the node that hosts the rendezvous may leave first, of which the others warn with pages of C++ frames.
settings+=(--env TORCH_CPP_LOG_LEVEL=ERROR)
containers=()
table=()
# A peer that has lost another says so at once; what has not ended this long after the first failure will not.
grace=20

finish() {
  status=$?
  trap '' INT TERM # cleaning up takes a few seconds, and is not to be interrupted
  if ((${#containers[@]})); then
    docker/compose.sh down --volumes --timeout 0 >/dev/null 2>&1 ||
      echo "run.sh: error: could not remove the cluster $COMPOSE_PROJECT_NAME: see docker ps" >&2
  fi
  ((${#table[@]} == 0)) || print_table
  case "$status" in
    0) ;;
    130 | 143) echo "run.sh: interrupted" >&2 ;;
    *) echo "run.sh: FAILED" >&2 ;;
  esac
  exit "$status"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

print_table() {
  printf '\n%-16s %-11s %-42s %-28s %7s\n' 'nodes x ranks' rendezvous job result seconds
  printf '%s\n' "${table[@]}"
}

add_row() { # CLUSTER RENDEZVOUS JOB RESULT SECONDS
  table+=("$(printf '%-16s %-11s %-42s %-28s %7s' "$@")")
}

# Start a cluster of N nodes, in place of the one before.
start_cluster() { # N
  local nodes=() node health deadline
  for ((node = 0; node < $1; node++)); do nodes+=("node$node"); done
  containers=(none) # there is something to remove from here on
  docker/compose.sh down --volumes --timeout 0 >/dev/null 2>&1
  docker/compose.sh up --detach "${nodes[@]}" >/dev/null
  mapfile -t containers < <(for node in "${nodes[@]}"; do docker/compose.sh ps -q "$node"; done)
  deadline=$((SECONDS + 60))
  for ((node = 0; node < $1; node++)); do
    until health=$(docker inspect --format '{{.State.Health.Status}}' "${containers[node]}") && [[ $health == healthy ]]; do
      if ((SECONDS > deadline)); then
        docker inspect --format '{{json .State}}' "${containers[node]}" >&2
        fail "node$node is $health after 60 s: its state is above"
      fi
      sleep 0.2
    done
  done
}

# Run a command in some nodes of the cluster at once, the first N; its failure on any of them is the run's.
run_job() { # NAME RENDEZVOUS N COMMAND...
  local name=$1 kind=$2 count=$3 started=$SECONDS failed='' give_up_at='' node pid status
  local cluster="${#containers[@]} x $ranks_per_node"
  local -A running=()
  echo "run.sh: $cluster ranks, $kind: $name"
  for ((node = 0; node < count; node++)); do
    run_in_node "$node" "$kind" "${@:4}" &
    running[$node]=$!
  done
  # By looking, as `wait` would not let us give up on a node.
  while ((${#running[@]})); do
    for node in "${!running[@]}"; do
      pid=${running[$node]}
      kill -0 "$pid" 2>/dev/null && continue
      unset "running[$node]"
      status=0
      wait "$pid" || status=$?
      ((status)) || continue
      echo "run.sh: node$node: $name failed: $(explain "$status")" >&2
      if [[ -z $failed ]]; then
        failed="node$node: $(explain "$status")" give_up_at=$((SECONDS + grace))
      fi
    done
    if [[ -n $give_up_at ]] && ((${#running[@]} && SECONDS > give_up_at)); then
      give_up_at=''
      echo "run.sh: ending the other nodes" >&2
      docker kill "${containers[@]}" >/dev/null
    fi
    sleep 0.1
  done
  add_row "$cluster" "$kind" "$name" "${failed:-passed}" "$((SECONDS - started))"
  [[ -z $failed ]] || exit 1
}

run_in_node() { # NODE RENDEZVOUS COMMAND...
  # timeout, inside the container, ends the job there; a docker exec that ends here does not.
  docker exec "${settings[@]}" --env "NNODES=${#containers[@]}" --env "RDZV_BACKEND=$2" "${containers[$1]}" \
    timeout --kill-after 10 "$timeout" "${@:3}" 2>&1 | sed --unbuffered "s/^/node$1 | /"
}

explain() { # STATUS
  case "$1" in
    124) echo "not done after $timeout s" ;;
    137) echo "killed" ;;
    *) echo "exit status $1" ;;
  esac
}

started=$SECONDS
docker/build.sh
# By what it is, not by its name, which another run may give to another image in the meantime.
SYNCACCUM_IMAGE=$(docker image inspect --format '{{.Id}}' "${SYNCACCUM_IMAGE:-syncaccum-node}")
export SYNCACCUM_IMAGE
add_row '' '' 'build the image' passed "$((SECONDS - started))"

torchrun=(launch/torchrun_multinode.sh -- --tee 3)
tests=(-m pytest --exitfirst --quiet --no-header --tb short -o console_output_style=classic -p no:cacheprovider
  -W ignore::pytest.PytestUnraisableExceptionWarning) # of a scandir that torch or pytest left open
training=(launch/train.py --epochs 1 --output)
for size in "${sizes[@]}"; do
  start_cluster "$size"
  if (($# == 0)); then
    run_job 'training in one container' local 1 \
      launch/torchrun_local.sh "$((size * ranks_per_node))" "${training[@]}" runs/local
  fi
  for kind in "${rendezvous[@]}"; do
    if (($#)); then
      run_job "$*" "$kind" "$size" "${torchrun[@]}" "$@"
      continue
    fi
    run_job 'tests/multinode/cluster' "$kind" "$size" "${torchrun[@]}" "${tests[@]}" tests/multinode/cluster
    run_job 'training' "$kind" "$size" "${torchrun[@]}" "${training[@]}" "runs/$kind"
    run_job 'same weights as in one container' "$kind" 1 \
      python -m tests.multinode.same_weights "runs/$kind" runs/local
  done
done
