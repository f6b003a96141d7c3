#!/usr/bin/env bash
# Run the tests of this folder in a network namespace of their own, where they make nodes and break their network.
set -euo pipefail
cd "$(dirname "$0")/../.."

fail() {
  echo "run.sh: error: $1. SYNCACCUM_SKIP=faults goes on without these tests" >&2
  exit 2
}

if [[ " ${SYNCACCUM_SKIP:-} " == *" faults "* ]]; then
  echo "run.sh: SKIPPED by SYNCACCUM_SKIP: no fault was tried"
  exit 0
fi
for program in ip unshare nsenter; do
  command -v "$program" >/dev/null || fail "$program is not installed: it is in iproute2 or util-linux"
done

# Root needs no user namespace, and some systems let nobody else have one.
namespace=(unshare --net)
((EUID == 0)) || namespace+=(--map-root-user)
"${namespace[@]}" true || fail "this system lets user $(id -un) make no network namespace: be root, or allow user namespaces"
export SYNCACCUM_FAULTS=1
exec "${namespace[@]}" "${PYTHON:-python3}" -m pytest tests/faults -p no:xdist "$@"
