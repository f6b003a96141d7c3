#!/usr/bin/env bash
# Fill docker/wheelhouse with the wheels that docker/Dockerfile installs, as this machine's pip finds them.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'USAGE'
usage: wheelhouse.sh [PYTHON_VERSION]

Fills docker/wheelhouse with all that the image installs, for Python PYTHON_VERSION (default 3.11), with the pip of
this machine and its settings. The image is then built without a network, and with the torch build that pip finds
here. Wheels that fit constraints.txt and pyproject.toml already are kept. Remove docker/wheelhouse/*.whl to build
over the network again.

  PYTHON   whose pip; default .venv/bin/python where that exists, else python3
USAGE
}

# shellcheck source=docker/common.sh
source docker/common.sh

case "${1:-3.11}" in
  -h | --help)
    usage
    exit 0
    ;;
  3.[0-9]*) version=${1:-3.11} ;;
  *) fail "PYTHON_VERSION is $1: give one such as 3.11 (see --help)" ;;
esac
python=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}
"$python" -m pip --version >/dev/null 2>&1 || fail "PYTHON is $python, which has no pip: name a Python that has"

exec 9<docker/wheelhouse
flock 9 # two runs of one checkout fill it one after the other
wanted="Python $version, $(cat constraints.txt pyproject.toml | sha256sum)"
if [[ -f docker/wheelhouse/.filled-for && "$(<docker/wheelhouse/.filled-for)" == "$wanted" ]]; then
  echo "wheelhouse.sh: the wheels in docker/wheelhouse fit"
  exit 0
fi
echo "wheelhouse.sh: filling docker/wheelhouse with $python -m pip"
new=$(mktemp -d)
trap 'rm -rf "$new"' EXIT
# hatchling builds syncaccum's own wheel.
"$python" -m pip download --quiet --only-binary :all: --python-version "$version" --constraint constraints.txt \
  --dest "$new" torch '.[multinode]' hatchling 2>"$new/pip.log" || {
  cat "$new/pip.log" >&2
  fail "$python -m pip did not find all wheels for Python $version; what it said is above"
}
rm -f docker/wheelhouse/*.whl
mv "$new"/*.whl docker/wheelhouse/
echo "$wanted" >docker/wheelhouse/.filled-for
echo "wheelhouse.sh: $(find docker/wheelhouse -name '*.whl' | wc -l) wheels, $(du -sh docker/wheelhouse | cut -f 1)"
