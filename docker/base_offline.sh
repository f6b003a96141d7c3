#!/usr/bin/env bash
# Make the base image of docker/Dockerfile from Debian's packages, where no container registry can be reached.
set -euo pipefail

image=syncaccum-base:bookworm

usage() {
  cat <<USAGE
usage: base_offline.sh

Makes the image $image from Debian's packages, for machines that reach a Debian mirror but no container
registry. Where the engine already has an image of that name, it is left alone; 'docker image rm' makes way for
a new one. Needs root, a running engine, and debootstrap, which is installed where apt-get can.
USAGE
}

# shellcheck source=docker/common.sh
source "$(dirname "$0")/common.sh"
take_no_arguments "$@"
need_engine
if docker image inspect "$image" >/dev/null 2>&1; then
  echo "base_offline.sh: $image is there already"
  exit 0
fi
((EUID == 0)) || fail "user $(id -un) is not root: debootstrap makes the image's files with their owners; use sudo"
if ! command -v debootstrap >/dev/null; then
  command -v apt-get >/dev/null || fail "debootstrap is not installed: install it with this machine's package manager"
  echo "base_offline.sh: installing debootstrap"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends debootstrap >/dev/null
fi

# The mirror that this machine's own packages come from, if they are bookworm's; else debootstrap's default.
mirror=()
if command -v apt-get >/dev/null; then
  # shellcheck disable=SC2016 # the placeholder is apt's
  mapfile -t mirror < <(apt-get indextargets --format '$(REPO_URI)' 'Codename: bookworm' 'Component: main' | head -n 1)
fi

root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
echo "base_offline.sh: making $image from Debian's packages, which takes a minute or two"
log=$root.log
# iproute2 is not in the registry's image; it is here to look at, and disturb, a node's network from inside.
if ! debootstrap --variant=minbase --include=python3,python3-venv,python3-pip,ca-certificates,iproute2 \
  bookworm "$root" "${mirror[@]}" >"$log" 2>&1; then
  tail -n 20 "$log" >&2
  fail "debootstrap failed; all it said is in $log"
fi
rm -f "$log" "$root"/var/cache/apt/archives/*.deb
ln -s python3 "$root/usr/bin/python" # as the registry's image has it
tar -C "$root" -c . | docker import --change 'CMD ["python3"]' - "$image" >/dev/null
echo "base_offline.sh: made $image"
