#!/usr/bin/env bash
# Remove a container in the midst of training, put a new one in its place, and see that nothing was lost.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'USAGE'
usage: replace_node.sh

Trains on two containers with two ranks each, under torchrun with the c10d rendezvous, removes one of the containers
(docker rm --force), starts another in its place and the same command in it. torchrun restarts the ranks, train.py goes
on from its checkpoint, and in the end all weights, statistics and momenta must be those of as many ranks in one
container that nobody disturbed, bit for bit. Takes half a minute; docker/run.sh or docker/build.sh builds the image.

  SYNCACCUM_IMAGE   the image (default syncaccum-node)

Exit status: 0 nothing was lost; 1 the training failed or differs; 2 it could not start.
USAGE
}

# shellcheck source=docker/common.sh
source docker/common.sh
take_no_arguments "$@"
need_engine

COMPOSE_PROJECT_NAME=syncaccum-replace-$$-$(date +%s)
export COMPOSE_PROJECT_NAME
trap 'docker/compose.sh down --volumes --timeout 0 >/dev/null 2>&1' EXIT

# 60 steps with a checkpoint after each.
training=(launch/train.py --model mlp --window 16 --train-images 480 --epochs 2 --checkpoint-every 1 --resume=auto)
checkpoint=runs/replaced/checkpoint-
patience=120 # seconds; torchrun gives a node up that it has not heard from for 15

in_node() { # NODE COMMAND...
  docker exec --env OMP_NUM_THREADS=1 "$(docker/compose.sh ps -q "$1")" timeout --kill-after 10 "$patience" "${@:2}"
}

train_on() { # NODE
  in_node "$1" env NNODES=2 RANKS_PER_NODE=2 RDZV_BACKEND=c10d PET_MAX_RESTARTS=3 \
    launch/torchrun_multinode.sh -- "${training[@]}" --output runs/replaced 2>&1 | sed --unbuffered "s/^/$1 | /"
}

newest_step() {
  in_node node0 sh -c "ls -r $checkpoint*.pt 2>/dev/null | head -n 1" | sed -E 's/.*-0*([0-9]+)\.pt/\1/'
}

await_step() { # STEP
  local deadline=$((SECONDS + patience)) step
  until step=$(newest_step) && ((${step:-0} >= $1)); do
    ((SECONDS < deadline)) || fail "no checkpoint of step $1 came in $patience s" 1
    sleep 0.2
  done
}

docker/compose.sh up --detach node0 node1 >/dev/null 2>&1
in_node node0 launch/torchrun_local.sh 4 "${training[@]}" --output runs/undisturbed >/dev/null

train_on node0 &
stays=$!
train_on node1 &
await_step 3
docker rm --force "$(docker/compose.sh ps -q node1)" >/dev/null
lost_at=$(newest_step)
removed=$SECONDS
((lost_at < 60)) || fail "the training was over before its container was removed" 1
docker/compose.sh up --detach node1 >/dev/null 2>&1
train_on node1 &
comes=$!
await_step "$((lost_at + 1))"
waited=$((SECONDS - removed))
wait "$stays" || fail "node0 failed: its last words are above" 1
wait "$comes" || fail "the new node1 failed: its last words are above" 1
in_node node0 python -m tests.multinode.same_weights runs/replaced runs/undisturbed
echo "replace_node.sh: passed: node1 removed after step $lost_at, replaced; the next checkpoint came $waited s later"
