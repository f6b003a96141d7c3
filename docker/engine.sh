#!/usr/bin/env bash
# A container engine that answers: installed where it is missing, and started where nothing has started it.
set -euo pipefail

log=/var/log/dockerd.log

usage() {
  cat <<USAGE
usage: engine.sh

Sees to it that the container engine answers and that compose is there. What is missing is installed with apt-get
(docker.io, docker-compose); an engine that does not run is started, without systemd by hand, its log in
$log. Where all of it is there already, nothing happens. Needs root, unless nothing is to be done.
USAGE
}

# shellcheck source=docker/common.sh
source "$(dirname "$0")/common.sh"
take_no_arguments "$@"

has_compose() {
  docker compose version >/dev/null 2>&1 || command -v docker-compose >/dev/null
}

may_change() { # WHAT
  ((EUID == 0)) || fail "$1, and user $(id -un) is not root: run this as root once, and join the group docker"
}

install_packages() { # PACKAGE...
  may_change "$* must be installed"
  command -v apt-get >/dev/null || fail "$* must be installed, and apt-get is not here: install it and run this again"
  echo "engine.sh: installing $*"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends "$@" >/dev/null
}

start_engine() {
  local by_hand='' tries
  may_change "no container engine answers"
  [[ -z ${DOCKER_HOST:-} ]] || fail "DOCKER_HOST is $DOCKER_HOST, where no engine answers: start that one, or unset it"
  if [[ -d /run/systemd/system ]]; then
    echo "engine.sh: starting docker.service"
    systemctl start docker
  else
    echo "engine.sh: starting dockerd"
    setsid dockerd >"$log" 2>&1 </dev/null &
    by_hand=$!
  fi
  for ((tries = 0; tries < 60; tries++)); do
    engine_answers && return
    [[ -z $by_hand ]] || kill -0 "$by_hand" 2>/dev/null || break
    sleep 1
  done
  [[ -z $by_hand ]] || tail -n 20 "$log" >&2
  [[ -n $by_hand ]] || systemctl status --no-pager docker >&2 || true
  fail "the engine does not answer after $tries s: why is above"
}

command -v dockerd >/dev/null || engine_answers || install_packages docker.io
engine_answers || start_engine
has_compose || install_packages docker-compose
echo "engine.sh: $(docker version --format 'engine {{.Server.Version}}') answers"
