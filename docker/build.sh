#!/usr/bin/env bash
# Build the image of a node: its base image first, and wheels from this machine where containers have no network.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'USAGE'
usage: build.sh

Builds the image of docker/Dockerfile. Where a container cannot install packages from the network, or
docker/wheelhouse has wheels, it installs those of docker/wheelhouse, which docker/wheelhouse.sh keeps up to date.

  SYNCACCUM_IMAGE   name of the image to build (default syncaccum-node)
  BASE              image to build it on (default python:3.11-slim-bookworm, or syncaccum-base:bookworm, which
                    docker/base_offline.sh makes where no container registry can be reached)
USAGE
}

# shellcheck source=docker/common.sh
source docker/common.sh
take_no_arguments "$@"
image=${SYNCACCUM_IMAGE:-syncaccum-node}
need_engine

has_image() {
  docker image inspect "$1" >/dev/null 2>&1
}

official=python:3.11-slim-bookworm
ours=syncaccum-base:bookworm
base=${BASE:-$official}
if ! has_image "$base"; then
  if [[ -z ${BASE:-} ]] && has_image "$ours"; then
    base=$ours
  else
    docker pull --quiet "$base" ||
      fail "the base image $base cannot be pulled: docker/base_offline.sh makes one of Debian's packages, or set BASE"
  fi
fi

# What a build over the network would do for each package.
installs_from_network() {
  docker run --rm "$base" timeout 30 \
    python3 -m pip download --quiet --no-deps --retries 0 --timeout 10 --dest /tmp hatchling >/dev/null 2>&1
}

has_wheels() {
  compgen -G 'docker/wheelhouse/*.whl' >/dev/null
}

if has_wheels || ! installs_from_network; then
  docker/wheelhouse.sh "$(docker run --rm "$base" python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
fi
echo "build.sh: building the image $image"
docker build --quiet --build-arg "BASE=$base" --tag "$image" --file docker/Dockerfile .
